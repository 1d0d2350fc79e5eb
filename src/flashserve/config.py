"""Every setting of FlashServe, read from a TOML file and FLASHSERVE_ variables, here alone.

Order, strongest first: FLASHSERVE_SECTION__NAME variables, the TOML file, the defaults below. The
file is FLASHSERVE_CONFIG, else `flashserve.toml` in the data directory, if it exists.
"""

from __future__ import annotations

import os
import pathlib
import re
import zoneinfo
from typing import Annotated, Literal, Self

import pydantic
import pydantic_settings
from pydantic import Field, PositiveFloat, PositiveInt

from flashserve.errors import InputError

DEFAULT_TENANT = "default"
"""What reports call whoever has a key without a name, or none."""
DEFAULT_CURRENCY = "USD"
_PREFIX = "FLASHSERVE_"
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
# Prefixed variables that are not settings of the server: where things are, and what clients use.
_OTHER_VARIABLES = {
    "FLASHSERVE_CONFIG",
    "FLASHSERVE_TRACES",
    "FLASHSERVE_URL",
    "FLASHSERVE_API_KEY",
    "FLASHSERVE_ADMIN_KEY",
}


def parse_bytes(value: object) -> object:
    """Accepts 4294967296, "4GiB", "512 MB"; anything else is left for pydantic to refuse."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]{0,2}?)b?\s*", value.lower())
        unit = {**_UNITS, **_BINARY_UNITS}.get(match[2]) if match else None
        if match and unit:
            return int(float(match[1]) * unit)
    return value


Bytes = Annotated[int, pydantic.BeforeValidator(parse_bytes), Field(gt=0)]
Quota = Annotated[int, pydantic.BeforeValidator(parse_bytes), Field(ge=0)]
Rate = Annotated[int, pydantic.BeforeValidator(parse_bytes), Field(ge=0)]
"""Bytes per second; 0 is no limit."""


def default_data_dir() -> pathlib.Path:
    """$XDG_DATA_HOME/flashserve, else ~/.local/share/flashserve."""
    base = os.environ.get("XDG_DATA_HOME")
    root = pathlib.Path(base) if base else pathlib.Path.home() / ".local" / "share"
    return root / "flashserve"


def _default_dram_bytes() -> int:
    """A quarter of the machine's memory, in whole 2 MiB pages."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // 4 >> 21 << 21


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ServerSettings(_Section):
    """Where the HTTP server listens and how it stops."""

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    """0 takes a free port, which the first line of output names."""
    grace_period_s: float = Field(30.0, ge=0)
    """After SIGTERM, running streams may go on for so long."""
    hold_headers_s: float = Field(2.0, ge=0)
    """A streaming answer waits so long for its first token before its headers leave, so that
    Server-Timing and an error's status are known. After it, comments keep the connection."""
    comment_interval_s: PositiveFloat = 5.0
    vllm_adapter_routes: bool = False
    """Also offer POST /v1/load_lora_adapter and /v1/unload_lora_adapter, for administrators."""
    max_body_bytes: Bytes = 8 << 20


class AuthSettings(_Section):
    """Keys. Without any, only loopback addresses can be bound."""

    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    """Further Host values to accept; loopback names always are."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API, such as https://chat.example.org."""


class TenantSettings(_Section):
    """Somebody whose requests are told from others' by their keys."""

    keys: tuple[str, ...] = ()
    """For /v1, like auth.api_keys."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Twice the weight is twice the share of a busy model."""


TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class DeploySettings(_Section):
    """What may be deployed over TCP. The command line on the same machine goes through a
    private Unix socket and is not bound by this.
    """

    roots: tuple[pathlib.Path, ...] = ()
    """Directories below which directory sources are accepted."""
    schemes: tuple[str, ...] = ("demo",)


class NodeSettings(_Section):
    """The node that this machine is."""

    num_workers: int = Field(2, gt=0, le=1024)
    """Worker processes kept ready; each serves one model at a time."""
    threads_per_worker: int = Field(0, ge=0)
    """Compute threads of one worker; 0 divides the cores among the workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What workers compute on; auto is CUDA where there is a device that torch can use."""
    dram_bytes: Bytes = _default_dram_bytes()
    """Size of the arena that holds checkpoints in host memory."""
    adapter_bytes: Quota | None = None
    """How much of it is for LoRA adapters alone, in whole 2 MiB; None is an eighth of it."""
    prefault: bool = True
    """Take the arena's memory from the kernel at start, in the background, not on first use."""

    @property
    def adapter_quota_bytes(self) -> int:
        return self.dram_bytes // 8 if self.adapter_bytes is None else self.adapter_bytes


class StoreSettings(_Section):
    """How checkpoints move between the tiers."""

    disk_bytes: Bytes = 100 << 30
    """Budget of the disk tier, which keeps what was fetched from remote sources."""
    disk_threads: PositiveInt = 8
    """Threads that read a checkpoint from disk."""
    disk_bytes_per_s: Rate = 0
    """Cap on reading from disk; 0 is none."""
    remote_connections: PositiveInt = 4
    """Parallel range reads of one fetch."""
    remote_bytes_per_s: Rate = 0
    """Cap on fetching from remote sources, all together; 0 is none."""
    remote_timeout_s: PositiveFloat = 20.0
    """A remote read that brings no byte for so long is given up and tried again."""
    remote_retries: int = Field(5, ge=0)
    recheck_s: float = Field(60.0, ge=0)
    """Least time between two looks at a remote source whose model starts from memory; they are made
    in the background, so a start may be served one last time from the version before."""
    verify_fetches: Literal["auto", "always", "behind"] = "auto"
    """When the digest that a remote origin promises is compared: before the model serves (always),
    after it started (behind), or auto: behind where TLS protects the transfer or it stays on this
    machine, else before."""
    execute_while_loading: bool = True
    """Start to compute with a model's first layers while the later ones are still on their way."""
    scrub_bytes_per_s: Rate = 32 << 20
    """Rate at which checkpoints in DRAM are compared with their checksums; 0 turns it off."""
    huge_pages: bool = True
    """Ask the kernel for huge pages for the arena where it has them for shared memory."""
    handout_bytes: Bytes = Field(default_factory=_default_dram_bytes)
    """Memory for copies of models that other processes (load_model, open_snapshot) hold."""
    handout_keep_s: float = Field(30.0, ge=0)
    """A copy that no process holds any more stays so long for the next one, unless another needs
    its room."""


class EngineSettings(_Section):
    """The batching engine of each worker."""

    kv_bytes: Bytes = 512 << 20
    """Memory for KV blocks, per worker."""
    block_tokens: PositiveInt = 16
    max_batch_sequences: PositiveInt = 32
    max_batch_tokens: PositiveInt = 512
    """Tokens of one step, prompts and decodes together; a longer prompt is prefilled in chunks."""
    adapter_bytes: Bytes = 256 << 20
    """Memory for LoRA adapters, per worker; taken when the first one is used. On a processor, up to
    half as much again while adapters decode, for copies of those in the batch."""
    max_lora_rank: PositiveInt = 128
    """An adapter of a higher rank is refused."""
    adapter_patience_steps: int = Field(64, ge=0)
    """A sequence whose adapter finds no memory is passed over in so many steps; then nobody behind
    it starts before it does."""
    reuse_prefixes: bool = True
    batch_invariant: bool = False
    """Make bf16 results on CPU independent of what else is in the batch, at some cost."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto computes in the checkpoint's own dtype, straight from the arena; another one copies."""


class PolicySettings(_Section):
    """When models start, wait and stop."""

    name: str = "flashserve"
    """The policy that says how many replicas each model has, and until when."""
    shadow: str | None = None
    """Another one, which only says what it would do with the same traffic."""
    keep_alive_s: float = Field(300.0, ge=0)
    queue_limit: PositiveInt = 256
    """Requests that may wait for one model; one more is answered 429."""
    deadline_s: PositiveFloat = 120.0
    """A request that has waited so long for its dispatch is answered 503."""
    max_attempts: PositiveInt = 3
    """Replicas that one request may lose before it is given up."""
    slot_patience_s: float = Field(10.0, ge=0)
    """A model that has waited so long for a slot gets the next one: the replica that has been
    busy longest takes no further requests and stops when its running ones are done."""
    max_replicas: PositiveInt = 1
    """Most replicas of a model that has no bound of its own. More than one helps where each worker
    has an accelerator; on a processor they share the same cores."""
    failure_backoff_s: float = Field(5.0, ge=0)
    """After a failed start, requests get the same error for so long before another is tried."""


class ForecastSettings(_Section):
    """What is remembered of arrivals, and forecast from it."""

    enabled: bool = True
    """Forecast arrivals, and tell the controller each minute; they are counted in any case."""
    model: Literal["auto", "hybrid", "hazard", "ewma-15"] = "auto"
    """auto gives each series the model that would have cost least so far; hybrid is hazard until
    its network has been trained."""
    history_days: int = Field(14, ge=1, le=28)
    """Days that the forecaster learns anew from when its state is lost."""
    training: bool = True
    """Train the network in the background."""
    training_interval_h: PositiveFloat = 24.0
    """Hours from the end of one training to the next."""
    training_memory_bytes: Bytes = 2 << 30
    """Most that the training process may take."""
    prefetch_chance: float = Field(0.5, gt=0, le=1)
    """An adapter that is asked for within five minutes with this chance is brought near."""
    prefetch_bytes: Quota | None = None
    """How much may be brought near so, at most; None is half of the adapters' part of the arena."""
    retention_days: PositiveInt = 28
    """Days (UTC) before today of which the arrivals of each minute are kept."""


LOCAL_TIME = "local"
"""The time zone that the machine is set to."""


def check_timezone(name: str) -> str:
    if name != LOCAL_TIME:
        try:
            zoneinfo.ZoneInfo(name)
        except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
            raise ValueError(
                f"no time zone named {name!r} is known here; use local, UTC or a name such as "
                "Europe/Berlin (where the system has none, `pip install tzdata`)"
            ) from None
    return name


class ScalingSettings(_Section):
    """What holds for models that were deployed without bounds of their own."""

    target: PositiveInt | None = None
    """Requests at once that one replica is meant to serve; None is as many as it can."""
    timezone: Annotated[str, pydantic.AfterValidator(check_timezone)] = LOCAL_TIME
    """Of the schedules."""


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Of money, in whatever currency all prices are."""


class PriceSettings(_Section):
    """What things cost; docs/reference/configuration.md names the sources of the defaults."""

    currency: str = Field(DEFAULT_CURRENCY, pattern=r"^\S{1,8}$")
    """Of all prices, for reports."""
    gpu_per_hour: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Of one worker's accelerator, or of its cores on a machine without one; None is a list price
    of what the node has."""
    dram_gb_per_hour: Amount = 0.004445
    """Of 10^9 bytes of host memory."""
    disk_gb_per_hour: Amount = 0.000111
    wait_per_s: Amount = 0.05
    """Of a second that a request waits for a start."""
    slo_miss: Amount = 0.2
    """Of a first token that a start made later than slo_s, on top of the wait."""
    slo_s: float = Field(1.0, gt=0, allow_inf_nan=False)

    @pydantic.model_validator(mode="after")
    def _check_currency(self) -> Self:
        """Raises ValueError for another currency beside a list price in dollars."""
        priced = ("gpu_per_hour", "dram_gb_per_hour", "disk_gb_per_hour")
        missing = [name for name in priced if name not in self.model_fields_set]
        if self.currency != DEFAULT_CURRENCY and missing:
            raise ValueError(
                f"in {self.currency}, also set {', '.join(missing)}: their defaults are in "
                f"{DEFAULT_CURRENCY}"
            )
        return self


class Settings(pydantic_settings.BaseSettings):
    """The whole configuration; see the module's docstring for where it is read from."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    data_dir: pathlib.Path = Field(default_factory=default_data_dir)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    server: ServerSettings = ServerSettings()
    auth: AuthSettings = AuthSettings()
    tenants: dict[TenantName, TenantSettings] = {}
    """By name; keys of auth.api_keys are of one more, which is called default."""
    deploy: DeploySettings = DeploySettings()
    node: NodeSettings = NodeSettings()
    store: StoreSettings = StoreSettings()
    engine: EngineSettings = EngineSettings()
    policy: PolicySettings = PolicySettings()
    forecast: ForecastSettings = ForecastSettings()
    scaling: ScalingSettings = ScalingSettings()
    price: PriceSettings = PriceSettings()

    @pydantic.model_validator(mode="after")
    def _check_tenants(self) -> Self:
        """Raises ValueError, without the keys themselves."""
        if DEFAULT_TENANT in self.tenants:
            raise ValueError(f"tenants.{DEFAULT_TENANT} is who has no name: use another")
        owners: dict[str, str] = {}
        whose = [("auth.api_keys", self.auth.api_keys), ("auth.admin_keys", self.auth.admin_keys)]
        whose += [(f"tenants.{name}.keys", tenant.keys) for name, tenant in self.tenants.items()]
        for setting, keys in whose:
            for key in keys:
                if setting.startswith("tenants.") and not key:
                    raise ValueError(f"{setting} holds an empty key")
                other = owners.setdefault(key, setting)
                if other != setting and "tenants." in other + setting:
                    raise ValueError(f"{other} and {setting} hold the same key")
        return self

    @property
    def users_need_key(self) -> bool:
        return bool(self.auth.api_keys or any(one.keys for one in self.tenants.values()))

    @property
    def tenant_weights(self) -> dict[str, float]:
        return {name: tenant.weight for name, tenant in self.tenants.items()}

    @property
    def prefetch_budget_bytes(self) -> int:
        given = self.forecast.prefetch_bytes
        return self.node.adapter_quota_bytes // 2 if given is None else given

    @property
    def socket_path(self) -> pathlib.Path:
        """The private Unix socket through which the command line reaches a running server."""
        return self.data_dir / "run" / "flashserve.sock"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[pydantic_settings.BaseSettings],
        init_settings: pydantic_settings.PydanticBaseSettingsSource,
        env_settings: pydantic_settings.PydanticBaseSettingsSource,
        dotenv_settings: pydantic_settings.PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: pydantic_settings.PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[pydantic_settings.PydanticBaseSettingsSource, ...]:
        file = pydantic_settings.TomlConfigSettingsSource(settings_cls, toml_file=_config_file())
        return init_settings, env_settings, file


def _config_file() -> pathlib.Path:
    if path := os.environ.get(_PREFIX + "CONFIG"):
        return pathlib.Path(path)
    data_dir = os.environ.get(_PREFIX + "DATA_DIR")
    return (pathlib.Path(data_dir) if data_dir else default_data_dir()) / "flashserve.toml"


def load_settings(**overrides: object) -> Settings:
    """The settings of this process, `overrides` (whole sections or top-level values) strongest.

    Raises:
        InputError: a value is wrong, a name unknown, or the file unreadable; one line that names
            the setting.
    """
    explicit = os.environ.get(_PREFIX + "CONFIG")
    if explicit and not pathlib.Path(explicit).is_file():
        raise InputError(f"FLASHSERVE_CONFIG names {explicit}, which is not a file")
    _refuse_unknown_variables()
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        where = f"setting {name}: " if name else ""
        raise InputError(where + first["msg"].removeprefix("Value error, ")) from None
    except (OSError, ValueError) as error:
        raise InputError(f"configuration {_config_file()}: {error}") from None


def _refuse_unknown_variables() -> None:
    """Pydantic ignores a variable whose section is misspelled, so names are compared here."""
    known = _OTHER_VARIABLES | {(_PREFIX + name).upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            known |= {f"{_PREFIX}{name}__{leaf}".upper() for leaf in section.model_fields}
    for variable in sorted(os.environ):
        if variable.startswith(_PREFIX) and variable not in known:
            raise InputError(f"environment variable {variable} is not a setting of FlashServe")
