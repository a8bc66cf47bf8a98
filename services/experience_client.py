"""Where `ExperienceClient` was before it moved to `services.client`; this import goes on working."""

from services.client.experience_client import ExperienceClient

__all__ = ["ExperienceClient"]
