"""Tiles cover every row once, keep dense and sparse apart, and stay within their budget. No torch."""

from __future__ import annotations

from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from engine.config import PAGE_SIZE
from engine.plan.tiles import LatentTileCosts, Segment, TileCosts, cut

COSTS = TileCosts(budget_bytes=1 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=1536)


@st.composite
def batches(draw: st.DrawFn) -> list[Segment]:
    segments: list[Segment] = []
    row = 0
    for number in range(draw(st.integers(1, 12))):
        count = draw(st.one_of(st.just(1), st.integers(1, 400)))
        start = draw(st.integers(0, 6000))
        pages = (start + count - 1) // PAGE_SIZE + 1
        segments.append(
            Segment(
                first_row=row,
                num_rows=count,
                start=start,
                page_ids=tuple(range(number * 1000, number * 1000 + pages)),
                index_top_k=draw(st.one_of(st.none(), st.integers(1, 3000))),
            )
        )
        row += count
    return segments


@given(segments=batches(), forced=st.sampled_from(["auto", "gather", "mask"]))
def test_each_row_is_in_one_tile_with_its_own_pages_and_its_own_top_k(
    segments: list[Segment], forced: Literal["auto", "gather", "mask"]
) -> None:
    costs = TileCosts(
        budget_bytes=1 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=1536, forced=forced
    )
    seen: dict[int, None] = {}
    of_row = {s.first_row + i: (s, s.start + i) for s in segments for i in range(s.num_rows)}
    for tile in cut(segments, costs):
        assert len(tile.rows) == 1 or all(len(rows) == 1 for rows in tile.rows)
        for rows, positions, pages, index_top_k in zip(
            tile.rows, tile.positions, tile.page_ids, tile.index_top_k, strict=True
        ):
            assert len(pages) == max(positions) // PAGE_SIZE + 1
            for row, position in zip(rows, positions, strict=True):
                assert row not in seen
                seen[row] = None
                segment, expected = of_row[row]
                assert position == expected
                assert segment.page_ids[: len(pages)] == pages
                dense = segment.index_top_k is None or position + 1 <= segment.index_top_k
                assert (tile.form == "dense") == dense
                if not dense:
                    assert index_top_k == segment.index_top_k
                    assert forced == "auto" or tile.form == forced
                else:
                    assert index_top_k >= position + 1
    assert len(seen) == len(of_row)


@given(segments=batches())
def test_a_tile_of_many_rows_stays_within_the_budget(segments: list[Segment]) -> None:
    for tile in cut(segments, COSTS):
        context = tile.context_pages * PAGE_SIZE
        if len(tile.rows) == 1 and len(tile.rows[0]) > 1:
            need = len(tile.rows[0]) * COSTS.row_bytes(tile.form, context, tile.index_top_k[0])
            assert need <= COSTS.budget_bytes
        elif len(tile.rows) > 1:
            worst = max(COSTS.row_bytes(tile.form, context, k) for k in tile.index_top_k)
            assert len(tile.rows) * min(worst, context * COSTS.token_bytes) <= COSTS.budget_bytes


@given(segments=batches())
def test_padding_wastes_at_most_half_of_a_decode_tile(segments: list[Segment]) -> None:
    for tile in cut(segments, COSTS):
        if len(tile.rows) > 1:
            shortest = min(len(pages) for pages in tile.page_ids)
            assert tile.context_pages <= 4 or shortest * 2 >= tile.context_pages


def test_the_cheaper_sparse_form_is_chosen_by_cost() -> None:
    costs = TileCosts(
        budget_bytes=1 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=1536,
        gather_cost=1.0, mask_cost=0.1,
    )  # fmt: skip
    assert costs.sparse_form(rows=128, context=640, index_top_k=65) == "mask"
    assert costs.sparse_form(rows=128, context=660, index_top_k=65) == "gather"
    assert costs.sparse_form(rows=1, context=128, index_top_k=65) == "gather"


LATENT = LatentTileCosts(
    budget_bytes=1 << 30, index_row_bytes=256, attention_row_bytes=512, token_bytes=1152,
    num_heads=128, item_bytes=2,
)  # fmt: skip


def test_latent_costs_are_those_of_the_published_shape() -> None:
    """Per row, token and layer: 128 heads read 576 and sum 512 numbers absorbed, 192 and 128 expanded."""
    assert LATENT.absorbed_cost(1, 101) - LATENT.absorbed_cost(1, 100) == 128 * (576 + 512)
    row = LATENT.expanded_cost(2, 100) - LATENT.expanded_cost(1, 100)
    assert row == 100 * 128 * (192 + 128)


def test_latent_attention_expands_a_context_that_many_rows_read() -> None:
    assert not LATENT.expands(rows=1, context=2048)
    assert not LATENT.expands(rows=64, context=2048)
    assert LATENT.expands(rows=512, context=2048)
    assert not LATENT.expands(rows=512, context=1 << 20)  # the expanded context does not fit the budget


def test_latent_attention_masks_short_prefills_and_gathers_long_ones() -> None:
    assert LATENT.sparse_form(rows=512, context=4096, index_top_k=2048) == "mask"
    assert LATENT.sparse_form(rows=512, context=65536, index_top_k=2048) == "gather"
    assert LATENT.sparse_form(rows=1, context=4096, index_top_k=2048) == "gather"


def test_a_tile_says_whether_it_is_expanded() -> None:
    prompt = Segment(first_row=0, num_rows=512, start=0, page_ids=tuple(range(8)), index_top_k=2048)
    decode = Segment(first_row=512, num_rows=1, start=900, page_ids=tuple(range(15)), index_top_k=2048)
    lone, many = cut([prompt, decode], LATENT)
    assert (lone.form, lone.expanded) == ("dense", False)
    assert (many.form, many.expanded) == ("dense", True)
    assert not any(tile.expanded for tile in cut([prompt, decode], COSTS))


STREAMED = LatentTileCosts(
    budget_bytes=64 << 20, index_row_bytes=0, attention_row_bytes=1, token_bytes=8, num_heads=128, streams=True,
    gather_cost=1.0, expanded_unit=1.2,
)  # fmt: skip


def test_streamed_tiles_of_long_contexts_keep_many_rows_together() -> None:
    """Whole, the index scores of one row of 64 heads over 128K tokens are half of the budget."""
    for index_top_k, expanded in ((None, True), (2048, False)):
        (segment,) = [
            Segment(
                first_row=0, num_rows=512, start=1 << 17, page_ids=tuple(range(2056)), index_top_k=index_top_k
            )
        ]
        tiles = cut([segment], STREAMED)
        assert len(tiles) <= 5
        assert {tile.expanded for tile in tiles[:-1]} == {expanded}
    whole = LatentTileCosts(
        budget_bytes=64 << 20, index_row_bytes=256, attention_row_bytes=512, token_bytes=1152, num_heads=128
    )
    assert len(cut([segment], whole)) == 512
