"""The mesh of devices, and where parameters, gradients and optimizer state lie on it.

The axes are XLA's to complete (GSPMD): the train step says where gradients, updates and whole weights lie, and the rest
follows from the operands. In explicit mode every reshape and gather of the model would have to say so as well.
"""

import math
from dataclasses import dataclass

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.model import gpt

AXES = ("node", "data", "model")
BATCH_AXES = ("node", "data")  # the axes that share out a batch's rows
GATHERED = "gathered weight"


def make_mesh(spec: str = "") -> Mesh:
    """All devices of all processes as (node, data, model); `spec` like "node=2,data=8", omitted axes are 1.

    Empty: all on data.
    """
    devices = jax.device_count()
    sizes, given = dict.fromkeys(AXES, 1), set()
    if not spec:
        sizes["data"] = devices
    for part in filter(None, spec.split(",")):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh={spec}: {part.strip()!r} is not one of node=N, data=N, model=N")
        if name in given:
            raise UserError(f"--mesh={spec}: {name} is there twice")
        given.add(name)
        sizes[name] = int(size)
    if math.prod(sizes.values()) != devices:
        node = math.gcd(sizes["node"], devices)
        model = math.gcd(sizes["model"], devices // node)
        raise UserError(
            f"--mesh={spec} is {math.prod(sizes.values())} devices, there are {devices}: "
            f"try node={node},data={devices // (node * model)},model={model}"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3)


def describe(mesh: Mesh) -> str:
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items())


def replicas(mesh: Mesh) -> int:
    """How many devices, or groups of them along the model axis, take rows of their own."""
    return mesh.shape["node"] * mesh.shape["data"]


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """(Which share of a batch's rows this process reads, of how many). Processes that hold one replica together, along
    the model axis, read the same rows."""
    holders = [frozenset(d.process_index for d in replica) for replica in mesh.devices.reshape(replicas(mesh), -1)]
    shares = list(dict.fromkeys(holders))
    if sum(map(len, shares)) > len(frozenset().union(*shares)):
        size, own = mesh.shape["model"], len(mesh.local_devices)
        fits = math.gcd(size, own)
        raise UserError(
            f"--mesh: model={size} takes parts of processes of {own} devices, which read whole rows: "
            f"try node={mesh.shape['node']},data={mesh.shape['data'] * size // fits},model={fits}"
        )
    return next(i for i, share in enumerate(shares) if jax.process_index() in share), len(shares)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_rows(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """This process's rows [micro, rows, t] of a batch as a global array, its rows spread over the replicas."""
    return jax.make_array_from_process_local_data(micro_batch_sharding(mesh), batch)


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(None, BATCH_AXES))


def put_flag(mesh: Mesh, flag: bool) -> jax.Array:
    """This process's flag as a global array int32 [devices]; positive in sum once any is up."""
    mine = np.full(len(mesh.local_devices), int(flag), np.int32)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), mine)


# -----------------------------------------------------------------------------
# For decoding and evaluation, which take parameters wherever they live


def mesh_of(params):
    """The mesh the parameters live on; None: they are on one device."""
    sharding = getattr(params["wte"], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def batch_sharding(mesh):
    """Arrays whose first axis is spread over the data axis. No mesh: None, JAX's word for one device."""
    return None if mesh is None else NamedSharding(mesh, P(BATCH_AXES))


def shard_map_rows(function, mesh):
    """`function(shared, *rows) -> rows`, each device computing its share of the rows without a word to the others.

    The first axis of every array in `rows` and of what is returned is that of the rows. No mesh: `function` itself.
    """
    if mesh is None:
        return function

    def spread(shared, *arrays):
        own = P(BATCH_AXES)
        specs = (P(), *[own] * len(arrays))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own)(shared, *arrays)

    return spread


def replicate(arrays, mesh):
    """Within jit: the arrays whole on every device, so that every process can read them. No mesh: as they are."""
    return arrays if mesh is None else jax.lax.with_sharding_constraint(arrays, replicated(mesh))


# -----------------------------------------------------------------------------
# For training


@dataclass(frozen=True)
class Layout:
    """Where parameters, gradients and optimizer state lie on a mesh.

    `shard` is "optimizer" (ZeRO stage 1, arXiv:1910.02054: every replica holds the weights, and its share of gradient
    and optimizer state) or "full" (FSDP: its share of the weights as well).
    """

    mesh: Mesh
    shard: str = "optimizer"

    def __post_init__(self):
        assert self.shard in ("optimizer", "full"), f"shard {self.shard!r}, expected optimizer or full"

    @property
    def full(self) -> bool:
        return self.shard == "full"

    def check(self, model_cfg: GPTConfig) -> None:
        """UserError for heads that the model axis does not divide; whatever else it does not divide stays whole."""
        size, heads, kv_heads = self.mesh.shape["model"], model_cfg.n_head, model_cfg.n_kv_head
        if heads % size or kv_heads % size:
            raise UserError(
                f"--mesh: model={size} does not divide {heads} heads and {kv_heads} key/value heads, and a head is not "
                f"cut: try model={math.gcd(heads, kv_heads, size)}"
            )

    def shard_specs(self, tree, along: tuple[str, ...] = ("data", "model")):
        """The spec of every leaf of parameters, gradients or optimizer state, cut along these axes of the mesh."""
        return jax.tree_util.tree_map_with_path(lambda path, x: self._spec(path, x.shape, along), tree)

    def compute_specs(self, tree):
        """The same, cut along the model axis alone: what a replica computes with."""
        return self.shard_specs(tree, ("model",))

    def param_specs(self, params):
        """How weights lie between steps."""
        return self.shard_specs(params) if self.full else self.compute_specs(params)

    def shardings(self, specs):
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=_is_spec)

    def constrain(self, tree, specs):
        return jax.lax.with_sharding_constraint(tree, self.shardings(specs))

    def gather(self, name: str, w: jax.Array) -> jax.Array:
        """A weight [in, out], whole on every replica for as long as it is used; its gradient is cut as it is formed."""
        if not self.full:
            return w
        cut, whole = (self._spec((jax.tree_util.DictKey(name),), w.shape, a) for a in (("data", "model"), ("model",)))

        @jax.custom_vjp
        def gathered(w):
            return checkpoint_name(self.constrain(w, whole), GATHERED)

        gathered.defvjp(lambda w: (gathered(w), None), lambda _, g: (self.constrain(g, cut),))
        return gathered(w)

    def by_replica(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """[micro, rows, t] -> [micro, replicas, rows of one, t], nothing moving."""

        def split(x):
            x = x.reshape(x.shape[0], replicas(self.mesh), -1, x.shape[-1])
            return self.constrain(x, P(None, BATCH_AXES))

        return jax.tree.map(split, batch)

    def constrain_per_replica(self, tree):
        """Leaves [replicas, ...] of (losses, gradients), each replica holding its own."""
        single = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), tree[1])
        return self.constrain(tree, (P(BATCH_AXES), self._of_replicas(single)))

    def _of_replicas(self, single):
        return jax.tree.map(lambda spec: P(BATCH_AXES, *spec), self.compute_specs(single), is_leaf=_is_spec)

    def reduce_scatter_grads(self, grads):
        """Gradients [replicas, ...], a replica's own each -> their sum, every replica holding its share."""

        def one(g, spec):
            g = g[0]
            if "data" in spec:
                g = jax.lax.psum_scatter(g, "data", scatter_dimension=spec.index("data"), tiled=True)
            else:
                g = jax.lax.psum(g, "data")
            # Between nodes, where the wires are slow, only the shares travel.
            return jax.lax.psum(g, "node") if self.mesh.shape["node"] > 1 else g

        single = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads)
        cut = self.shard_specs(single)
        return jax.shard_map(
            lambda grads: jax.tree.map(one, grads, cut),
            mesh=self.mesh, in_specs=(self._of_replicas(single),), out_specs=cut,
            check_vma=False,  # an axis of one needs no reduction, which the check does not see
        )(grads)  # fmt: skip

    def all_to_all_matrices(self, x: jax.Array) -> jax.Array:
        """Matrices [n, in, out], `in` cut along data -> whole ones, their number, padded, shared out instead.

        Spelled out, since XLA's partitioner finds this exchange on some meshes only, and else gathers everything.
        """
        size = self.mesh.shape["data"]
        x = jax.numpy.pad(x, ((0, -x.shape[0] % size), (0, 0), (0, 0)))
        if x.shape[1] % size:
            return self.constrain(x, P("data"))

        def exchange(x):
            # One array with one layout: XLA on a CPU refuses to send slices of the arrays that x was made of.
            x = jax.lax.optimization_barrier(x)
            return jax.lax.all_to_all(x, "data", split_axis=0, concat_axis=1, tiled=True)

        return jax.shard_map(exchange, mesh=self.mesh, in_specs=P(None, "data"), out_specs=P("data"))(x)

    def _spec(self, path: tuple, shape: tuple[int, ...], axes: tuple[str, ...]) -> P:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        known = gpt.SHARDING.get(names[-1], ()) if names else ()
        known = known[len(known) - len(shape) :]  # a layer's weight [in, out] out of the stack [l, in, out]
        if len(known) != len(shape):  # counters
            return P()
        cut = [a if a in axes and n % self.mesh.shape[a] == 0 else None for a, n in zip(known, shape, strict=True)]
        return P(*cut)


def _is_spec(x) -> bool:
    return isinstance(x, P)
