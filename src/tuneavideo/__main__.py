"""`python -m tuneavideo` and `accelerate launch -m tuneavideo`."""

from tuneavideo.cli import main

if __name__ == "__main__":
    main()
