"""The ``turret`` command before torch is loaded: flags, settings, checks, completion."""
