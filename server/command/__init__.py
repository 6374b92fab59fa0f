"""What the ``turret`` command does before torch is there: flags, settings, checks, completion."""
