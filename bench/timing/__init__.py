"""The time of every op beside its contenders."""
