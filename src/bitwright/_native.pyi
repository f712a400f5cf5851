from torch import Tensor

class Format:
    def __init__(
        self,
        zero: int,
        encoding: int,
        lo: float,
        hi: float,
        first: float,
        reach: float,
        turned: bool,
        level: list[float],
        code: list[int],
    ) -> None: ...

class Codebook:
    def __init__(
        self,
        points: Tensor,
        entries: Tensor,
        middle: Tensor,
        near: Tensor,
        level: Tensor,
        width: int,
        run: int,
        has_signs: bool,
        even: bool,
    ) -> None: ...

def search(
    format: Format,
    w: Tensor,
    weight: Tensor,
    shrink: Tensor,
    factor: Tensor,
    quick: bool,
    g: int,
    scale: Tensor,
    zero: Tensor | None,
    threads: int,
) -> None: ...
def round_rows(
    format: Format,
    w: Tensor,
    weight: Tensor,
    shrink: Tensor,
    factor: Tensor,
    quick: bool,
    g: int,
    scale: Tensor,
    zero: Tensor | None,
    codes: Tensor,
    sums: Tensor,
    threads: int,
) -> None: ...
def nearest_runs(codebook: Codebook, x: Tensor, u: Tensor | None, codes: Tensor, threads: int) -> None: ...
def put_side_by_side(numbers: Tensor, bytes: Tensor, n: int, bits: int, turn: int) -> None: ...
def put_rows(rows: Tensor, place: Tensor) -> None: ...
def take_side_by_side(bytes: Tensor, numbers: Tensor, n: int, bits: int, less: int) -> None: ...
def round_columns(
    format: Format,
    target: Tensor,
    original: Tensor,
    propagation: Tensor,
    group: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codes: Tensor,
    errors: Tensor,
    threads: int,
) -> None: ...
def sweep(
    format: Format,
    decoded: Tensor,
    pull: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    H: Tensor,
    curvature: Tensor,
    ridge: float,
    solve: bool,
    g: int,
    begin: int,
    threads: int,
) -> None: ...
def tune(
    format: Format,
    w: Tensor,
    base: Tensor,
    offset: Tensor,
    square: Tensor,
    start: Tensor,
    scale: Tensor,
    stretch: Tensor,
    stretch_square: Tensor,
    zero: Tensor | None,
    gradient: Tensor | None,
    decoded: Tensor,
    g: int,
    movable: bool,
    rate: float,
    scale_rate: float,
    fresh: float,
    threads: int,
) -> None: ...
def names() -> list[str]: ...
def choose(name: str) -> None: ...
def current() -> str: ...

class Matrix:
    def __init__(
        self,
        panels: Tensor,
        scale: Tensor,
        point: Tensor | None,
        minimum: Tensor | None,
        unit: Tensor,
        bits: int,
        offset: int,
        high: list[int],
        low: list[int],
        N: int,
        K: int,
        g: int,
    ) -> None: ...

def decode_rows(
    matrix: Matrix, level: list[float], factor: float, first: int, last: int, to: Tensor, threads: int
) -> None: ...
def product(matrix: Matrix, x: Tensor, y: Tensor, bytes: int, by_row: bool, threads: int) -> None: ...
def product_of_floats(w: Tensor, x: Tensor, y: Tensor, threads: int) -> None: ...

Linear = tuple[Matrix | Tensor, Tensor | None, Tensor | None]
Block = tuple[list[Linear], tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]

class Decoder:
    def __init__(
        self,
        layers: list[Block],
        norm: Tensor,
        head: Linear,
        cosine: Tensor,
        sine: Tensor,
        heads: int,
        key_heads: int,
        D: int,
        window: int,
        epsilon: float,
        scaling: float,
        bytes: int,
    ) -> None: ...
    def read(self, x: Tensor, slots: Tensor, places: Tensor, cache: Tensor, bits: int, threads: int) -> None: ...
    def finish(self, x: Tensor, logits: Tensor, threads: int) -> None: ...

Two = tuple[int, int]
Four = tuple[int, int, int, int]

class IntegerLayer:
    def __init__(
        self,
        w: Tensor,
        start: Tensor,
        scale: Tensor,
        constant: Tensor,
        sums: Tensor,
        N: int,
        groups: int,
        C: int,
        groups_of_k: int,
        taps: Two,
        tap_step: int,
        steps: int,
        kernel: Two,
        stride: Two,
        dilation: Two,
        padding: Four,
    ) -> None: ...
    def codes_to_codes(self, x: Tensor, y: Tensor, border: int, low: float, high: float, threads: int) -> None: ...
    def codes_to_numbers(self, x: Tensor, y: Tensor, border: int, threads: int) -> None: ...
    def numbers_to_numbers(
        self, x: Tensor, y: Tensor, low: float, high: float, inverse: float, zero: bool, threads: int
    ) -> None: ...
    def recur(
        self,
        state: IntegerLayer,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        y: Tensor,
        backwards: bool,
        low: float,
        high: float,
        inverse: float,
        zero: bool,
        threads: int,
    ) -> None: ...

def enter_codes(x: Tensor, y: Tensor, scale: float, zero: float, low: float, high: float, threads: int) -> None: ...
def add_codes(a: Tensor, b: Tensor, y: Tensor, factor: list[float], low: float, high: float, threads: int) -> None: ...
def look_up_codes(x: Tensor, table: Tensor, y: Tensor, threads: int) -> None: ...
def largest_codes(
    x: Tensor, y: Tensor, kernel: Two, stride: Two, dilation: Two, padding: Four, threads: int
) -> None: ...
