"""Tools that build, check and measure the packages; standard library only."""
