"""Settings: `models` makes frozen, typed objects of a TOML file; `user_code` finds the things that
a setting names as `package.module:Name`.
"""
