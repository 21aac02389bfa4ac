"""Where the stores are and which card key they are written under.

Each setting comes from the first of: the environment (TALLY_<NAME>), the TOML file that
TALLY_CONFIG names, the running stack's own file in the data folder, the default.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from features import CardKey
from features.merchants import DAYS_KEPT

STACK_FILE = "stack.json"
CARD_KEY_FILE = "card.key"
CARD_KEY_FILE_BYTES = 32
HISTORY_DAYS_MIN = DAYS_KEPT + 31 + 2
"""The days that are kept of a merchant, a month for late events, the day that is not over yet, and one for
questions that are asked late."""
HISTORY_DAYS_MAX = 36_500


class SettingsError(ValueError):
    """A setting is missing or unusable; the message says which and what to do."""


PORT_MAX = 65_535


def _checked_address(text: str) -> str:
    host, _, port = text.rpartition(":")
    is_bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) <= PORT_MAX):
        raise PydanticCustomError("address", "it must be host:port, the port from 1 to 65535")
    if is_bare_ipv6:
        raise PydanticCustomError("address", "an IPv6 address stands in brackets: [::1]:7600")
    return text


def _checked_optional_address(text: str) -> str:
    return _checked_address(text) if text else text


Address = Annotated[str, AfterValidator(_checked_address)]
"""host:port to listen on."""
OptionalAddress = Annotated[str, AfterValidator(_checked_optional_address)]
"""The same; empty for none."""


def data_folder() -> Path:
    """The data folder: TALLY_DATA, or .tally here."""
    return Path(os.environ.get("TALLY_DATA", ".tally")).absolute()


def read_stack_file(data: Path) -> dict[str, Any]:
    """What the stack in a data folder wrote about itself; empty where there is none."""
    try:
        content: dict[str, Any] = json.loads((data / STACK_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    return content


class StoreSettings(BaseSettings):
    """Both stores and the card key."""

    model_config = SettingsConfigDict(env_prefix="TALLY_", extra="ignore")

    data: Path = Field(default_factory=data_folder, description="Data folder of the stack.")
    redis_url: SecretStr | None = Field(None, description="Online store: redis://host:port/db.")
    postgres_url: SecretStr | None = Field(
        None, description="Offline store: postgresql://user@host:port/database."
    )
    history_days: int | None = Field(
        None,
        ge=HISTORY_DAYS_MIN,
        le=HISTORY_DAYS_MAX,
        description="Days of transactions that are kept; `tally batch` drops months that are older. "
        "Empty for all.",
    )
    card_key_file: Path | None = Field(
        None, description="File with the secret that turns card numbers into card ids."
    )
    card_key: SecretStr | None = Field(
        None, description="The same secret itself; used instead of the file."
    )

    def __init__(self, **given: Any) -> None:
        """Takes settings by name, before what is set elsewhere.

        Raises:
            SettingsError: one is missing, or cannot be used.
        """
        try:
            super().__init__(**given)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            raise SettingsError("; ".join(map(self._sentence, problems))) from None

    @classmethod
    def _sentence(cls, problem: ErrorDetails) -> str:
        """What is wrong with a setting; of a secret, not what it is."""
        name = str(problem["loc"][0])
        is_secret = "Secret" in str(cls.model_fields[name].annotation)
        given = "" if is_secret else f"={problem['input']}"
        return f"TALLY_{name.upper()}{given}: {problem['msg'].replace('Input', 'it', 1)}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The order of the module's docstring."""
        given = init_settings()
        data = Path(given["data"]) if "data" in given else data_folder()
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if "TALLY_CONFIG" in os.environ:
            if not Path(os.environ["TALLY_CONFIG"]).is_file():
                raise SettingsError(f"TALLY_CONFIG={os.environ['TALLY_CONFIG']} is no file")
            sources.append(TomlConfigSettingsSource(settings_cls, Path(os.environ["TALLY_CONFIG"])))
        sources.append(InitSettingsSource(settings_cls, read_stack_file(data).get("settings", {})))
        return tuple(sources)

    def store_urls(self) -> tuple[str, str]:
        """(redis, postgres).

        Raises:
            SettingsError: one is not set, and no stack runs in the data folder.
        """
        if self.redis_url is None or self.postgres_url is None:
            missing = "TALLY_REDIS_URL" if self.redis_url is None else "TALLY_POSTGRES_URL"
            raise SettingsError(
                f"no stack runs in {self.data}, and {missing} is not set: "
                f"start one with `tally up --data {self.data}`"
            )
        return self.redis_url.get_secret_value(), self.postgres_url.get_secret_value()

    def load_card_key(self) -> CardKey:
        """The card key.

        Raises:
            SettingsError: none is set, or it cannot be read, or is too short.
        """
        if self.card_key is not None:
            secret = self.card_key.get_secret_value().encode()
        elif self.card_key_file is not None:
            try:
                secret = self.card_key_file.read_bytes().strip()
            except OSError as error:
                raise SettingsError(
                    f"the card key file {self.card_key_file} cannot be read: {error.strerror}"
                ) from error
        else:
            raise SettingsError("no card key: set TALLY_CARD_KEY_FILE or TALLY_CARD_KEY")
        try:
            return CardKey(secret)
        except ValueError as error:
            raise SettingsError(str(error)) from None


def make_card_key_file(path: Path) -> None:
    """Makes a card key, readable by its owner only; leaves one that is there."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(CARD_KEY_FILE_BYTES) + "\n")
