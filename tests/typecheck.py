"""The type checker that jaxtyping runs on every call of the package under pytest."""
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float
