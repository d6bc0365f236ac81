"""Launch settings that `full_sequence.py` tries, by rows of a span."""

from sparse_dlm_attn_triton.span_tiles import Tile

ATTEND_TILES = {
    128: [
        Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 4),
        Tile(128, 128, 8, 2),
        Tile(128, 64, 4, 3),
        Tile(64, 64, 4, 3),
        Tile(64, 128, 4, 2),
        Tile(128, 32, 8, 4),
        Tile(128, 64, 8, 3, tma=True),
        Tile(128, 64, 8, 4, tma=True),
        Tile(128, 128, 8, 2, tma=True),
        Tile(64, 64, 4, 3, tma=True),
        Tile(128, 64, 8, 3, tma=True, warp_specialize=True),
    ],
    32: [
        Tile(32, 64, 4, 3),
        Tile(32, 32, 4, 3),
        Tile(32, 32, 2, 3),
        Tile(32, 128, 4, 2),
        Tile(64, 64, 4, 3),
        Tile(64, 64, 4, 2),
        Tile(64, 128, 4, 2),
        Tile(64, 32, 4, 3),
        Tile(64, 32, 4, 4, tma=True),
        Tile(64, 64, 4, 2, registers=168),
        Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 2),
        Tile(128, 32, 8, 4),
        Tile(128, 32, 8, 4, tma=True),
    ],
}
POOLED_TILES = [
    Tile(128, 128, 8, 2),
    Tile(128, 128, 8, 3),
    Tile(128, 64, 8, 3),
    Tile(128, 64, 4, 3),
    Tile(128, 128, 4, 2),
    Tile(64, 128, 4, 2),
    Tile(128, 64, 8, 2),
]
