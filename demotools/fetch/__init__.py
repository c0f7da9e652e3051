"""Published files to stores: decide, then transfer, then convert.

`plan` decides from facts alone what is to be done; `places` knows where a file is asked for;
`transfer` gets its bytes whatever the network does, `part_file` puts them on the disk, resumed
and checked; `tarball` takes files out of a published archive as it passes; `job` runs it all;
`list` shows what there is.
"""
