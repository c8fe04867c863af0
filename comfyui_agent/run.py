"""`python -m comfyui_agent.run`: monitor and executor in one process; the same as `e3 start`."""

from runcomfy.cli.e3 import start_program

if __name__ == "__main__":
    start_program()
