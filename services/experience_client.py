"""The former location of `ExperienceClient`, kept so that existing imports continue to work."""

from services.client.experience_client import ExperienceClient

__all__ = ["ExperienceClient"]
