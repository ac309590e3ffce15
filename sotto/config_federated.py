"""The section `setting` of a federated run: what a user's device computes, and what it becomes before it is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from sotto.config_types import Count, Positive, Real, Section

if TYPE_CHECKING:
    from sotto.config import Config

CodecName = Literal["none", "srht", "subspace", "learned", "autoencoder"]


class FederatedSetting(Section):
    """Text stays with its users; a server gets one bounded vector of each user who takes part in a round.

    `run` is the server's: its steps are rounds, `expected_batch_size` is the expected number of users in a round, and
    its optimizer applies what the rounds release. `privacy.num_units` is the number of registered users.
    """

    kind: Literal["federated"]
    """Where data and compute live: `federated` over the devices of users, or over sites."""
    sites: Count | None = None
    """Sites, such as hospitals, that hold many units each. Every site is then asked in every round, draws its own units
    in secret, clips each of them and adds up: together that is one step of central training. Default: every device
    holds users, who are drawn by the server and protected with all that they have."""
    local_epochs: Count = 1
    """Passes of a device over its user's examples in a round."""
    local_batch_size: Count = 8
    """Examples in a local step."""
    local_learning_rate: Positive = 0.1
    """Of the local steps. What the server makes of the result is `run.learning_rate`."""
    local_optimizer: Literal["sgd", "adamw"] = "sgd"
    """What takes the local steps. It starts afresh in every round."""
    local_clip_norm: Positive | None = None
    """Bound on the norm of a local step's gradient, against outliers; it has no part in the guarantee."""
    parts: Count = 1
    """`gradient: zeroth_order`: into how many parts the trained tensors are split. A user looks along directions of one
    part alone, another one in every round by a public draw: less work for it, and more directions for the model (Spry).
    """
    codec: CodecName = "none"
    """How an update is shortened. `none`: not at all. `srht`: a public random projection, new in every round, for
    bandwidth. `subspace`: the directions in which gradients of public text vary most, for less noise. `learned`: the
    directions of earlier releases, and some random ones. `autoencoder`: a network trained on random numbers, to compare
    with; it prints how little it keeps."""
    latent: Count | None = None
    """Numbers that are sent of an update, with any codec but `none`."""
    public_data: str | None = None
    """A file of public text of the shape of `data.train`, for `codec: subspace` or `embedding_rows`. It is not
    protected."""
    embedding_rows: Count | None = None
    """With `method.train: full` or `lora`: so many rows of the token embedding are trained and sent in a round, with
    all else that is trained, and the other rows stay as they are (partial embedding updates). They are drawn anew in
    every round; with `public_data`, they are those of its most frequent tokens, in all rounds. `lora` alone would not
    train any."""
    noise: Literal["server", "clients"] = "server"
    """Who adds the noise. `server`: the sum is noised after it was taken; the server is trusted with it. `clients`:
    each adds a share, so that the sum of those who answer carries enough."""
    dropouts: Annotated[Real, Field(ge=0, lt=1)] = 0.2
    """`noise: clients`: the part of the drawn users, or of the sites, that may fail to answer without the noise falling
    short."""
    masks: bool = False
    """`noise: clients`: every message travels under masks that cancel in the sum, so the server learns sums alone, each
    of at least as many users, or sites, as carry the plan's noise. With fewer, a round gives nothing."""
    timeout: Positive = 600.0
    """Seconds that a round waits for answers; with `masks`, each of its four stages. Who is late has not answered."""

    @model_validator(mode="after")
    def _codec_has_its_numbers(self) -> FederatedSetting:
        if self.sites is not None and self.codec != "none":
            raise ValueError("codec is for updates of users: a site's sum is clipped unit by unit, before it is one")
        if self.parts > 1 and self.sites is not None:
            raise ValueError("parts are dealt out to users: a site looks at all of them")
        if (self.codec == "none") != (self.latent is None):
            raise ValueError("latent is how many numbers a codec sends: every codec but none needs it")
        if self.codec == "subspace" and self.public_data is None:
            raise ValueError("codec: subspace needs public_data")
        if self.public_data is not None and self.codec != "subspace" and self.embedding_rows is None:
            raise ValueError("public_data belongs to codec: subspace, or to embedding_rows")
        if self.embedding_rows is not None and (self.sites is not None or self.codec != "none"):
            raise ValueError("embedding_rows is for updates of users, and for codec: none")
        if self.masks and self.noise != "clients":
            raise ValueError("masks hide who sent what, so each message must bring its own noise: set noise: clients")
        return self


def agree(setting: FederatedSetting, config: Config) -> None:
    """Refuses what a federated run cannot do with the rest of its configuration.

    Raises:
      ValueError: naming the keys that do not go together.
    """
    method = config.method
    if setting.sites is None and method.gradient not in ("auto", "zeroth_order"):
        raise ValueError(
            "setting.kind: federated bounds what a user's device sends, so devices train as they like: set "
            "method.gradient: auto, or zeroth_order"
        )
    if (setting.sites is None and method.clipping == "automatic") or method.laplace or method.side_cache:
        raise ValueError(
            "setting.kind: federated needs method.clipping: flat or adaptive, Gaussian noise, and no side_cache"
        )
    if setting.sites is not None and method.clipping == "adaptive":
        raise ValueError("setting.sites needs method.clipping: flat or automatic")
    if method.zeroth_order and setting.codec != "none":
        raise ValueError("setting.codec is not for method.gradient: zeroth_order, which sends few numbers anyway")
    if setting.noise == "clients" and (not config.privacy.private or method.clipping == "adaptive"):
        raise ValueError("setting.noise: clients needs a privacy budget, and method.clipping: flat")
    if setting.noise == "clients" and config.privacy.exact_noise:
        raise ValueError("privacy.exact_noise needs setting.noise: server: devices add their shares in float64")
    rows = setting.embedding_rows is not None
    if rows and (method.zeroth_order or method.train not in ("full", "lora") or config.output.export == "adapter"):
        raise ValueError(
            "setting.embedding_rows needs gradients, method.train: full or lora, and no output.export: adapter, "
            "which would leave the embedding out"
        )
    if setting.parts > 1 and not method.zeroth_order:
        raise ValueError("setting.parts is for method.gradient: zeroth_order")
    if setting.noise == "clients" and method.zeroth_order:
        raise ValueError("setting.noise: clients is not for method.gradient: zeroth_order")
    if setting.masks and (1 - setting.dropouts) * (setting.sites or config.run.expected_batch_size) < 2:
        raise ValueError("setting.masks needs two users, or sites, in a round after dropouts")
