"""One module per command of `demotools`, thin; imported when it is called."""
