"""Where jobs run, which know nothing of it: `processes` of this machine, or a Dask `cluster`."""
