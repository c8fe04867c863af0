"""`python -m comfyui_agent.monitor`: job files into the database; the same as `e3 monitor`."""

from runcomfy.cli.e3 import monitor_program

if __name__ == "__main__":
    monitor_program()
