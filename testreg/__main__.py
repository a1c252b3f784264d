"""`python -m testreg`, as `accelerate launch -m` needs it."""

from .cli import main

main()
