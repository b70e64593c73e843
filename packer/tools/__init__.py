"""Tools that look before a run is paid for: `python -m packer simulate | show | stats | check`."""
