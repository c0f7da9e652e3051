"""Where jobs run, of which they know nothing: `processes` on this machine, or a Dask `cluster`."""
