"""`python -m tuneavideo` and `accelerate launch -m tuneavideo`."""

from tuneavideo.cli.main import main

if __name__ == "__main__":
    main()
