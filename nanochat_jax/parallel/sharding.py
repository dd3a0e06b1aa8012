"""Defines the mesh of devices, and how parameters, gradients and optimizer state are sharded over it.

The mesh has three axes. The axes `node` and `data` split a batch's rows. The axis `data` also shards the optimizer
state and, with --shard=full, the weights. The axis `model` shards the attention heads, the MLP's hidden width and the
vocabulary of the output head. A replica is a group of devices that together compute with one copy of the model. The
number of devices in a replica is the size of the model axis.

The axes are in JAX's Auto mode. The train step sets the sharding of gradients, updates and gathered weights, and XLA's
partitioner (GSPMD) chooses all other shardings. In Explicit mode, every reshape and gather in the model would have to
state its sharding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from nanochat_jax.config import GPTConfig, UserError
from nanochat_jax.model import gpt

PyTree = Any  # nested dicts and tuples of arrays, or of their shapes, specs or shardings
AXES = ("node", "data", "model")
BATCH_AXES = ("node", "data")  # the axes over which a batch's rows are sharded
GATHERED = "gathered weight"  # jax.checkpoint policies refer to the result of `Layout.gather` by this name


def make_mesh(spec: str = "", of: np.ndarray | None = None) -> Mesh:
    """Arranges devices in a mesh with the axes node, data and model: those of `of`, or all devices of all processes.

    `spec` is the value of --mesh, like "node=2,data=8". Omitted axes have size 1. If `spec` is empty, all devices
    are on the data axis. Raises UserError if `spec` is malformed, or if the product of the axis sizes differs from the
    number of devices.
    """
    devices = jax.device_count() if of is None else of.size
    sizes, given = dict.fromkeys(AXES, 1), set()
    if not spec:
        sizes["data"] = devices
    for part in filter(None, spec.split(",")):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh={spec}: {part.strip()!r} is not one of node=N, data=N, model=N")
        if name in given:
            raise UserError(f"--mesh={spec}: {name} is given twice")
        given.add(name)
        sizes[name] = int(size)
    if math.prod(sizes.values()) != devices:
        node = math.gcd(sizes["node"], devices)
        model = math.gcd(sizes["model"], devices // node)
        raise UserError(
            f"--mesh={spec} needs {math.prod(sizes.values())} devices, this run has {devices}: "
            f"try node={node},data={devices // (node * model)},model={model}"
        )
    places = None if of is None else of.ravel().tolist()
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=places)


def describe(mesh: Mesh) -> str:
    """Returns the sizes of the mesh's axes, such as "node=1, data=8, model=1"."""
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items())


def replicas(mesh: Mesh) -> int:
    """Returns the number of replicas. Each replica computes its own rows of a batch."""
    return mesh.shape["node"] * mesh.shape["data"]


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count). A batch's rows are split into `count` equal parts, and this process reads part `index`.

    If a replica spans several processes, all of these processes read the same rows. Example: two processes have four
    devices each. With model=4, one process gets (0, 2) and the other gets (1, 2). With model=8, both get (0, 1).
    """
    holders = [frozenset(d.process_index for d in replica) for replica in mesh.devices.reshape(replicas(mesh), -1)]
    shares = list(dict.fromkeys(holders))
    if sum(map(len, shares)) > len(frozenset().union(*shares)):  # two process groups in `shares` overlap
        size, own = mesh.shape["model"], len(mesh.local_devices)
        fits = math.gcd(size, own)
        raise UserError(
            f"--mesh: model={size} does not line up with the {own} devices of a process, which must read whole rows: "
            f"try node={mesh.shape['node']},data={mesh.shape['data'] * size // fits},model={fits}"
        )
    return next(i for i, share in enumerate(shares) if jax.process_index() in share), len(shares)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, P())


def put_rows(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """Joins the rows [accum, rows, t] of all processes into one global array [accum, all rows, t].

    The rows of this array are split over the replicas.
    """
    return jax.make_array_from_process_local_data(micro_batch_sharding(mesh), batch)


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch [accum, rows, t] whose rows are split over the replicas."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def put_flag(mesh: Mesh, flag: bool) -> jax.Array:
    """Makes a global int32 array [devices] in which every device holds the flag of its process.

    The sum of the array is positive if any process passes True.
    """
    mine = np.full(len(mesh.local_devices), int(flag), np.int32)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), mine)


# -----------------------------------------------------------------------------
# For decoding and evaluation: the parameters may have any sharding


def mesh_of(params: gpt.Params) -> Mesh | None:
    """Returns the mesh of the parameters, or None if they are on a single device without a mesh."""
    sharding = getattr(params["wte"], "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Returns the sharding of arrays [rows, ...] whose rows are split over the replicas.

    Without a mesh, returns None. JAX then uses a single device.
    """
    return None if mesh is None else NamedSharding(mesh, P(BATCH_AXES))


def on_local_devices(params: gpt.Params) -> gpt.Params:
    """Replicates the parameters over the devices of this process, as arrays that only this process shares.

    Every process of a run must call this function. Parameters on a single device without a mesh stay there.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return params
    local = Mesh(np.array(mesh.local_devices).reshape(1, -1, 1), AXES, axis_types=(AxisType.Auto,) * 3)

    def share(x: jax.Array) -> jax.Array:
        copies = {shard.device: shard.data for shard in x.addressable_shards}
        ordered = [copies[device] for device in local.devices.flat]
        return jax.make_array_from_single_device_arrays(x.shape, replicated(local), ordered)

    return jax.tree.map(share, jax.device_put(params, replicated(mesh)))


def gather_weight(name: str, w: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Within jit, all-gathers a weight over the replicas. Without a mesh, does nothing.

    The weight stays sharded over the model axis. `name` is its name in gpt.SHARDING.
    """
    if mesh is None:
        return w
    layout, tree = Layout(mesh), {name: w}
    return layout.constrain(tree, layout.compute_specs(tree))[name]


def shard_map_rows(function: Callable[..., PyTree], mesh: Mesh | None) -> Callable[..., PyTree]:
    """Wraps `function(shared, *arrays) -> result` so that each replica computes its own rows, without communication.

    Every device gets all of `shared`. In all other arguments and in the result, the rows are the first axis of each
    array. Without a mesh, returns `function` itself.
    """
    if mesh is None:
        return function

    def sharded(shared: PyTree, *arrays: PyTree) -> PyTree:
        own = P(BATCH_AXES)
        specs = (P(), *[own] * len(arrays))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own)(shared, *arrays)

    return sharded


def replicate(arrays: PyTree, mesh: Mesh | None) -> PyTree:
    """Within jit, all-gathers the arrays, so that every device holds them whole. Without a mesh, does nothing."""
    return arrays if mesh is None else jax.lax.with_sharding_constraint(arrays, replicated(mesh))


# -----------------------------------------------------------------------------
# For training


@dataclass(frozen=True)
class Layout:
    """How parameters, gradients and optimizer state are sharded over a mesh.

    `shard` has one of two values:
    - "optimizer" (ZeRO stage 1, arXiv:1910.02054): every replica holds all weights, but only a shard of the summed
      gradients and of the optimizer state.
    - "full" (FSDP): every replica holds only a shard of the weights, the summed gradients and the optimizer state.

    In the comments below, [in, out] is the shape of one layer's weight, and R is the number of replicas.
    """

    mesh: Mesh
    shard: str = "optimizer"

    def __post_init__(self):
        assert self.shard in ("optimizer", "full"), f"shard {self.shard!r}, expected optimizer or full"

    @property
    def full(self) -> bool:
        return self.shard == "full"

    def check(self, model_cfg: GPTConfig) -> None:
        """Raises UserError if the query heads or the key/value heads cannot be split evenly over the model axis.

        Other axes of weights, such as the MLP's hidden width, may have any length: an axis that cannot be split evenly
        stays whole.
        """
        size, heads, kv_heads = self.mesh.shape["model"], model_cfg.n_head, model_cfg.n_kv_head
        if heads % size or kv_heads % size:
            raise UserError(
                f"--mesh: model={size} does not divide {heads} heads and {kv_heads} key/value heads, and a head is "
                f"never split: try model={math.gcd(heads, kv_heads, size)}"
            )

    def shard_specs(self, tree: PyTree, axes: tuple[str, ...] = ("data", "model")) -> PyTree:
        """Returns one spec for each array in `tree`. The specs shard the arrays over the mesh axes named in `axes`.

        `tree` holds parameters, gradients or optimizer state.

        Example: the spec of wq [20, 1280, 1280] on the mesh node=1,data=8,model=1 is P(None, "data", "model").
        """
        return jax.tree_util.tree_map_with_path(lambda path, x: self._spec(path, x.shape, axes), tree)

    def compute_specs(self, tree: PyTree) -> PyTree:
        """Returns the specs of the weights during forward and backward passes.

        These specs shard only over the model axis.
        """
        return self.shard_specs(tree, ("model",))

    def param_specs(self, params: PyTree) -> PyTree:
        """Returns the specs of the weights between steps."""
        return self.shard_specs(params) if self.full else self.compute_specs(params)

    def shardings(self, specs: PyTree) -> PyTree:
        """Turns specs into shardings on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=_is_spec)

    def constrain(self, tree: PyTree, specs: PyTree) -> PyTree:
        """Within jit, shards the arrays of `tree` according to `specs`."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(specs))

    def gather(self, name: str, w: jax.Array) -> jax.Array:
        """All-gathers a weight [in, out] just before use. The backward pass shards the weight's gradient."""
        if not self.full:  # every replica already holds the whole weight
            return w
        # For example, wq has the axes [d, h*k]. In wq and in its gradient, d is sharded over data, and h*k is sharded
        # over model. In the gathered wq, only h*k is sharded.
        path = (jax.tree_util.DictKey(name),)
        sharded, gathered_spec = self._spec(path, w.shape, ("data", "model")), self._spec(path, w.shape, ("model",))

        @jax.custom_vjp
        def gathered(w: jax.Array) -> jax.Array:
            return checkpoint_name(self.constrain(w, gathered_spec), GATHERED)

        gathered.defvjp(lambda w: (gathered(w), None), lambda _, g: (self.constrain(g, sharded),))
        return gathered(w)

    def whole(self, x: jax.Array) -> jax.Array:
        """Keeps activations x [b,t,d] unsharded over the model axis.

        Otherwise, XLA would shard the residual stream like the embedding, over d. Then every norm would need an
        all-reduce, and every matmul an all-gather.
        """
        if self.mesh.shape["model"] == 1:
            return x
        return self.constrain(x, P(BATCH_AXES) if self.full else P())  # the train step's vmap adds the replicas' axes

    def per_device(self, function: Callable[..., PyTree], own: PyTree, shared: PyTree) -> PyTree:
        """Returns function(*own, *shared). Each device computes its own rows of the arrays in `own`.

        XLA's partitioner cannot look into a kernel, and would gather all rows first. The rows of a replica are not
        split any further, and with --shard=optimizer, the train step's vmap is over the replicas.
        """
        assert not self.full, "the fused block does not gather weights"
        return jax.shard_map(
            lambda own, shared: function(*own, *shared),
            mesh=self.mesh, in_specs=P(), out_specs=P(), check_vma=False,
        )(own, shared)  # fmt: skip

    def by_replica(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Splits rows by replica: [accum, rows, t] -> [accum, R, rows of one replica, t]. No data moves."""

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(x.shape[0], replicas(self.mesh), -1, x.shape[-1])
            return self.constrain(x, P(None, BATCH_AXES))

        return jax.tree.map(split, batch)

    def constrain_per_replica(self, tree: PyTree) -> PyTree:
        """Shards (losses [R], gradients [R, ...]) so that each replica holds its own loss and gradients."""
        single = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), tree[1])
        return self.constrain(tree, (P(BATCH_AXES), self._per_replica_specs(single)))

    def _per_replica_specs(self, single: PyTree) -> PyTree:
        """Returns the specs of the gradients [R, ...]. `single` holds the shapes [...] of one replica's gradients."""
        return jax.tree.map(lambda spec: P(BATCH_AXES, *spec), self.compute_specs(single), is_leaf=_is_spec)

    def reduce_scatter_grads(self, grads: PyTree, dtype: DTypeLike) -> PyTree:
        """Sums the gradients [R, ...] over the replicas. The sums [...] are sharded over data.

        Within a node, the gradients travel in `dtype`. All sums are in the gradients' own dtype, and travel between
        nodes in it. So each gradient is rounded once, however many replicas there are.

        First, the replicas of a node exchange their gradients, so that each replica sums one shard of them. Then these
        shards are all-reduced between the nodes. So whole gradients never cross the slow links between nodes.
        """

        def reduce(g: jax.Array, spec: P) -> jax.Array:
            g = g[0]  # this replica's gradient: [1, ...] -> [...]
            if "data" not in spec:  # no axis can be sharded over data, so every replica gets the whole sum
                g = jax.lax.psum(g, "data")
            elif jnp.finfo(dtype).bits >= jnp.finfo(g.dtype).bits:
                # [in, out] -> a shard, such as [in/data, out] for wq
                g = jax.lax.psum_scatter(g, "data", scatter_dimension=spec.index("data"), tiled=True)
            else:  # [in, out] -> [data, in/data, out] -> [in/data, out]: as many bytes as a reduce-scatter in `dtype`
                axis, size = spec.index("data"), self.mesh.shape["data"]
                parts = g.astype(dtype).reshape(*g.shape[:axis], size, -1, *g.shape[axis + 1 :])
                g = jax.lax.all_to_all(parts, "data", axis, axis).sum(axis, dtype=g.dtype)
            return jax.lax.psum(g, "node") if self.mesh.shape["node"] > 1 else g

        single = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads)
        specs = self.shard_specs(single)
        return jax.shard_map(
            lambda grads: jax.tree.map(reduce, grads, specs),
            mesh=self.mesh,
            in_specs=(self._per_replica_specs(single),),
            out_specs=specs,
            check_vma=False,  # the VMA check would demand a reduction even over a mesh axis of size 1
        )(grads)

    def gather_updates(self, updates: PyTree, dtype: DTypeLike) -> PyTree:
        """All-gathers the optimizer's updates, rounded to `dtype`. With --shard=full, they stay sharded as they are."""
        if self.full or self.mesh.shape["data"] == 1:
            return updates
        narrow = self.constrain(jax.tree.map(lambda u: u.astype(dtype), updates), self.shard_specs(updates))
        whole = self.constrain(narrow, self.compute_specs(updates))
        return jax.tree.map(lambda w, u: w.astype(u.dtype), whole, updates)

    def all_to_all_matrices(self, x: jax.Array) -> jax.Array:
        """Distributes the matrices in x [n, in, out] over the data axis, so that each device has whole matrices.

        The argument is sharded along its axis `in`. The result is sharded along its axis n.

        Zero matrices are appended until n is a multiple of the data axis's size. Example: on 8 devices, 52 matrices are
        padded to 56, and each device holds 7. This function calls all_to_all explicitly, because XLA's partitioner
        would use it only on some meshes. On other meshes, the partitioner would all-gather all matrices.
        """
        size = self.mesh.shape["data"]
        x = jnp.pad(x, ((0, -x.shape[0] % size), (0, 0), (0, 0)))
        if x.shape[1] % size:  # `in` is not sharded, so the devices need no exchange
            return self.constrain(x, P("data"))

        def exchange(x: jax.Array) -> jax.Array:  # [n, in/data, out] -> [n/data, in, out]
            # If x is built from several arrays, XLA on a CPU refuses to send slices of those arrays. The barrier makes
            # x one array.
            x = jax.lax.optimization_barrier(x)
            return jax.lax.all_to_all(x, "data", split_axis=0, concat_axis=1, tiled=True)

        return jax.shard_map(exchange, mesh=self.mesh, in_specs=P(None, "data"), out_specs=P("data"))(x)

    def _spec(self, path: tuple, shape: tuple[int, ...], axes: tuple[str, ...]) -> P:
        """Returns the spec of the array at `path` in a tree, taken from the table gpt.SHARDING.

        The spec keeps a mesh axis only if this axis is named in `axes` and its size divides the length of the array's
        axis.
        """
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        table_row = gpt.SHARDING.get(names[-1], P()) if names else P()
        row = table_row[len(table_row) - len(shape) :]  # drops l for a single layer's weight [in, out]
        if len(row) != len(shape):  # the optimizer's counters have the shape []
            return P()
        return P(*[a if a in axes and n % self.mesh.shape[a] == 0 else None for a, n in zip(row, shape, strict=True)])


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
