"""Public door: settings. They live in `runcomfy.domain.settings` and are read by `runcomfy.adapters.config`."""

from runcomfy.adapters.config import SettingRow, describe_settings, load_settings
from runcomfy.domain.settings import AppSettings, CloudSettings, ComfySettings, FileSettings, Settings

__all__ = [
    "AppSettings",
    "CloudSettings",
    "ComfySettings",
    "FileSettings",
    "SettingRow",
    "Settings",
    "describe_settings",
    "load_settings",
]
