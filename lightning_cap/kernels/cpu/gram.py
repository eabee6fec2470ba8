"""The inner loop of accumulation: a tile of sums of products, formed in vector registers and added to a packed triangle.

A tile is as large as the registers allow: its sums hide the latency of multiply-adds, and each load serves several of them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from lightning_cap.kernels.cpu.tile import BYTES, spread

_I32 = ir.IntType(32)
_ADDRESS = ir.IntType(8).as_pointer()
_WIDE = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]  # 32 registers of 64 bytes
#: Rows of a tile, and the most vectors of 64 bytes in one.
HEIGHT, MOST = (8, 3) if _WIDE else (4, 1)


class _Tile:
    """Writes the code of one tile; see `_products`."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, vectors: int) -> None:
        self.builder, self.vectors = builder, vectors
        out, rows = (context.make_array(t)(context, builder, a) for t, a in zip(signature.args[:2], args, strict=False))
        self.out, self.given = out.data, rows.data
        self.out_size = cgutils.unpack_tuple(builder, out.shape, 1)[0]
        self.width = cgutils.unpack_tuple(builder, rows.shape, 2)[1]
        self.n, self.first, self.column, self.last, self.inside = args[2:]
        self.word, scalar = self.n.type, context.get_value_type(signature.args[0].dtype)
        self.size = context.get_abi_sizeof(scalar)
        self.lanes = BYTES // self.size
        self.vector = ir.VectorType(scalar, self.lanes)
        self.sums = [[cgutils.alloca_once(builder, self.vector) for _ in range(vectors)] for _ in range(HEIGHT)]

    def const(self, value: int) -> Any:
        return ir.Constant(self.word, value)

    def plus(self, value: Any, more: int) -> Any:
        return self.builder.add(value, self.const(more))

    def at(self, s: Any, column: Any) -> Any:
        return self.builder.gep(self.given, [self.builder.add(self.builder.mul(s, self.width), column)])

    def as_vector(self, pointer: Any) -> Any:
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def sum_up(self) -> None:
        """The sums of all rows, from zero, in registers."""
        builder = self.builder
        for total in (total for line in self.sums for total in line):
            builder.store(ir.Constant(self.vector, None), total)
        with cgutils.for_range_slice(builder, self.const(0), self.n, self.const(1)) as (s, _):
            columns = [self.at(s, self.plus(self.column, k * self.lanes)) for k in range(self.vectors)]
            ys = [builder.load(self.as_vector(place), align=self.size) for place in columns]
            for a, line in enumerate(self.sums):
                factors = spread(builder, builder.load(self.at(s, self.plus(self.first, a))), self.lanes)
                for total, y in zip(line, ys, strict=True):
                    product = builder.fmul(factors, y, flags=["contract"])
                    builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)

    def places(self) -> Any:
        """``(start of the triangle's row, its last entry, first entry, its address, sums)`` of each vector."""
        builder = self.builder
        for a, line in enumerate(self.sums):
            row = builder.sub(self.last, self.plus(self.first, a))
            start = builder.lshr(builder.mul(row, self.plus(row, 1)), self.const(1))
            for k, total in enumerate(line):
                entry = builder.sub(self.last, self.plus(self.column, (k + 1) * self.lanes - 1))
                yield start, row, entry, builder.gep(self.out, [builder.add(start, entry)]), total

    def fetch(self) -> None:
        """Ask for what is to be added to, while the sums are formed."""
        for _, _, _, place, _ in self.places():
            for line in (0, self.lanes - 1):  # two cache lines, as a rule
                fetch(self.builder, self.builder.gep(place, [self.const(line)]), write=True)

    def add(self) -> None:
        """Whole vectors, or the lanes alone that are in the triangle."""
        builder = self.builder
        mirror = ir.Constant(ir.VectorType(_I32, self.lanes), list(range(self.lanes - 1, -1, -1)))

        def reversed_sums(total: Any) -> Any:
            return builder.shuffle_vector(builder.load(total), ir.Constant(self.vector, ir.Undefined), mirror)

        with builder.if_else(self.inside) as (whole, part):
            with whole:
                for _, _, _, place, total in self.places():
                    target = self.as_vector(place)
                    value = builder.fadd(builder.load(target, align=self.size), reversed_sums(total))
                    builder.store(value, target, align=self.size)
            with part:
                numbers = ir.Constant(ir.VectorType(self.word, self.lanes), list(range(self.lanes)))
                for start, row, entry, place, total in self.places():
                    there = builder.icmp_signed("<", start, self.out_size)  # else a row of padding
                    most = builder.select(there, builder.sub(row, entry), self.const(-1))
                    mask = builder.icmp_signed("<=", numbers, spread(builder, most, self.lanes))
                    self.add_masked(self.as_vector(place), reversed_sums(total), mask)

    def add_masked(self, target: Any, value: Any, mask: Any) -> None:
        builder, kind = self.builder, f"v{self.lanes}f{8 * self.size}.p0"
        align = ir.Constant(_I32, self.size)
        types = [target.type, _I32, mask.type, self.vector]
        load = _function(builder, f"llvm.masked.load.{kind}", ir.FunctionType(self.vector, types))
        types = [self.vector, target.type, _I32, mask.type]
        store = _function(builder, f"llvm.masked.store.{kind}", ir.FunctionType(ir.VoidType(), types))
        before = builder.call(load, [target, align, mask, ir.Constant(self.vector, None)])
        builder.call(store, [builder.fadd(before, value), target, align, mask])


def _function(builder: Any, name: str, kind: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, kind, name)


def fetch(builder: Any, pointer: Any, write: bool) -> None:
    """Ask for a cache line. Any address will do."""
    kind = ir.FunctionType(ir.VoidType(), [_ADDRESS, _I32, _I32, _I32])
    settings = [ir.Constant(_I32, value) for value in (int(write), 2, 1)]  # into the second level
    builder.call(_function(builder, "llvm.prefetch.p0", kind), [builder.bitcast(pointer, _ADDRESS), *settings])


def _products(vectors: int) -> Any:
    """``products(triangle, rows, n, first, column, last, inside)``: add ``Σ_s rows[s, i] · rows[s, j]`` to a packed triangle.

    ``i`` runs over `HEIGHT` rows from ``first``, ``j`` over ``vectors`` times 64 bytes of entries from ``column``, ``s`` over ``n``
    rows. The triangle's row ``last - i`` has the entry of ``j`` at ``last - j``. ``inside`` is True if all of them are in the
    triangle; else those that are not are left out. The arrays are C-contiguous; nothing is checked.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(context, builder, signature, args, vectors)
        tile.fetch()
        tile.sum_up()
        tile.add()
        return context.get_dummy_value()

    @intrinsic
    def products(typing: Any, triangle: Any, rows: Any, n: Any, first: Any, column: Any, last: Any, inside: Any) -> Any:
        numbers = (types.intp,) * 4
        return types.void(triangle, rows, *numbers, types.boolean), generate

    return products


one_vector, two_vectors, most_vectors = (_products(vectors) for vectors in (1, min(2, MOST), MOST))


def _prefetch() -> Any:
    """``prefetch(array, s, b, j)``: ask for the cache line of an entry of a C-contiguous array, which need not be in it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = context.make_array(signature.args[0])(context, builder, args[0])
        _, blocks, width = cgutils.unpack_tuple(builder, given.shape, 3)
        block = builder.add(builder.mul(args[1], blocks), args[2])
        fetch(builder, builder.gep(given.data, [builder.add(builder.mul(block, width), args[3])]), write=False)
        return context.get_dummy_value()

    @intrinsic
    def prefetch(typing: Any, array: Any, s: Any, b: Any, j: Any) -> Any:
        return types.void(array, types.intp, types.intp, types.intp), generate

    return prefetch


prefetch = _prefetch()
