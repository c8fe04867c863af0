"""`python -m comfyui_agent.execute`: jobs from the database to ComfyUI; the same as `e3 run`."""

from runcomfy.cli.e3 import execute_program

if __name__ == "__main__":
    execute_program()
