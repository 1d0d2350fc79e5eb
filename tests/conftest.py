"""What holds for every test: nothing about time is asserted, examples of properties included."""

from hypothesis import settings

settings.register_profile("flashserve", deadline=None)
settings.load_profile("flashserve")
