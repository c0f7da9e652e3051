"""Turns published files into stores: decide, then download, then convert.

`plan` decides what to do, without doing it; `places` finds where a file can be downloaded;
`transfer` transfers its bytes over an unreliable network, and `part_file` resumes and checks them
on disk; `tarball` extracts files from a published archive while it streams; `job` runs everything;
`list` shows what is available.
"""
