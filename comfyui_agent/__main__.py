"""`python -m comfyui_agent COMMAND`: the same as `e3 COMMAND`."""

from runcomfy.cli.e3 import main

if __name__ == "__main__":
    main()
