"""Settings: `models` turns a TOML file into frozen, typed objects; `user_code` imports what a
setting names as `package.module:Name`.
"""
