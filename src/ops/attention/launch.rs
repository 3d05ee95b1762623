//! The choice of attention kernels and their grids. Layer 4.
//!
//! Invariant: the choice between simt and tensor cores depends on the context and the dtype alone,
//! so forward, backward and decode agree. Both take the same arguments; only the items of a launch
//! differ: rows (simt) or tiles of rows (tensor cores). The Hopper kernels belong to the tensor
//! cores. Their forward has the bits of the mma.sync kernels, so it may run or not; their backward
//! has bits of its own.

use super::plan::AttnPlan;
use super::rows::PagedRows;
use super::shape::{Numbers, PAGE};
use crate::autograd::Cx;
use crate::config::AttentionChoice;
use crate::device::{Capabilities, DType, Launch};
use crate::error::{Error, Result};
use crate::kernels::{
    self, AttentionDecodeArgs, AttentionDeltaArgs, AttentionDkvArgs, AttentionFwdArgs,
    AttentionHopperDkvArgs, AttentionHopperDqArgs, AttentionHopperFwdArgs, AttentionPagedFwdArgs,
    Boxes, HOPPER_BWD_ROWS, MMA_ROWS, hopper_fwd_rows,
};
use crate::ops::prefetch::{LINE, most_prefetched};
use crate::ops::rmsnorm::Norm;
use crate::ops::rope::RopeArgs;
use crate::tensor::Tensor;

/// Head sizes of the forward on Hopper, each with a kernel of its own.
const HOPPER_FWD_D: [usize; 2] =
    [kernels::ATTENTION_HOPPER_FWD_D[0], kernels::ATTENTION_HOPPER_FWD_WIDE_D[0]];

fn tensor_cores(cx: &Cx, n: &Numbers, tensors: &[&Tensor]) -> Result<bool> {
    let bf16 = tensors[0].dtype() == DType::BF16;
    let chosen = match cx.attention {
        AttentionChoice::Simt => false,
        AttentionChoice::Auto => bf16 && cx.device.capabilities().tensor_cores,
        AttentionChoice::TensorCore | AttentionChoice::Wgmma => true,
    };
    if chosen && !bf16 {
        let what = tensors[0].dtype().name();
        let message = format!("tensor-core attention needs bfloat16, not {what}; use simt");
        return Err(Error::op("attention", message));
    }
    if chosen && n.heads / n.kv_heads > MMA_ROWS as i32 {
        let message = format!("more than {MMA_ROWS} heads per key-value head; use simt");
        return Err(Error::op("attention", message));
    }
    // Rows are copied 16 bytes at a time.
    match tensors.iter().find(|t| t.address() % 16 != 0 || t.stride() % 8 != 0) {
        Some(t) if chosen => {
            Err(Error::op("attention", format!("{t:?} has rows that are not 16-byte aligned")))
        }
        _ => Ok(chosen),
    }
}

/// Whether a Hopper kernel, which has these head sizes, runs in place of the mma.sync kernel.
fn wgmma(cx: &Cx, n: &Numbers, head_sizes: &[usize]) -> Result<bool> {
    let device = cx.device.capabilities();
    match cx.attention {
        AttentionChoice::Auto if !device.wgmma => return Ok(false),
        // A CPU runs them too, for tests.
        AttentionChoice::Wgmma if device.tensor_cores && !device.wgmma => {
            let message = format!("wgmma needs a Hopper GPU, not {}; use auto", cx.device.name());
            return Err(Error::op("attention", message));
        }
        AttentionChoice::Auto | AttentionChoice::Wgmma => {}
        AttentionChoice::Simt | AttentionChoice::TensorCore => return Ok(false),
    }
    Ok(head_sizes.contains(&n.d))
}

fn blocks(tiles: &Tensor, heads: i32) -> Launch {
    Launch::grid([tiles.row_count() * heads as usize, 1, 1])
}

pub(super) fn forward(
    cx: &Cx,
    n: &Numbers,
    out: &Tensor,
    lse: Option<&Tensor>,
    qkv: &Tensor,
    plan: &AttnPlan,
) -> Result<()> {
    let (t, dev) = (plan.tables(cx)?, &*cx.device);
    let rows = AttentionFwdArgs {
        out: out.out(),
        lse: lse.map(Tensor::out),
        qkv,
        items: &t.row_segment,
        segments: &t.segments,
        rows: plan.rows as i32,
        ld: qkv.stride() as i32,
        heads: n.heads,
        kv_heads: n.kv_heads,
        scale: n.scale,
        softcap: n.softcap,
        window: n.window,
    };
    if tensor_cores(cx, n, &[qkv])? {
        if wgmma(cx, n, &HOPPER_FWD_D)? {
            const { assert!(hopper_fwd_rows(64) == HOPPER_BWD_ROWS, "both take the wide tiles") };
            let items = if n.d <= 64 { &t.wide_tiles } else { &t.hopper_tiles };
            let tiles = AttentionHopperFwdArgs {
                out: out.out(),
                lse: lse.map(Tensor::out),
                qkv,
                map: Boxes::swizzled(qkv, PAGE),
                items,
                segments: &t.segments,
                ld: qkv.stride() as i32,
                heads: n.heads,
                kv_heads: n.kv_heads,
                scale: n.scale,
                softcap: n.softcap,
                window: n.window,
            };
            let kernel = match (n.d <= 64, n.softcap > 0.0) {
                (true, _) => kernels::attention_hopper_fwd,
                (false, false) => kernels::attention_hopper_fwd_wide,
                (false, true) => kernels::attention_hopper_fwd_wide_capped,
            };
            return kernel(dev, blocks(items, n.heads), n.d, tiles);
        }
        let tiles = AttentionFwdArgs { items: &t.query_tiles, ..rows };
        return kernels::attention_mma_fwd(dev, blocks(&t.query_tiles, n.heads), n.d, tiles);
    }
    kernels::attention_fwd(dev, Launch::flat(plan.rows * n.heads as usize), n.d, rows)
}

/// `x`: qkv, cache, page table, sequence and position of each row.
pub(super) fn paged(cx: &Cx, n: &Numbers, out: &Tensor, x: &[&Tensor]) -> Result<()> {
    const { assert!(PAGE == MMA_ROWS, "a step of the forward is one page") };
    let (qkv, cache, page_table) = (x[0], x[1], x[2]);
    let rows = qkv.row_count();
    let args = AttentionPagedFwdArgs {
        out: out.out(),
        qkv,
        cache,
        page_table,
        row_sequence: x[3],
        row_position: x[4],
        rows: rows as i32,
        ld: qkv.stride() as i32,
        heads: n.heads,
        kv_heads: n.kv_heads,
        max_pages: page_table.cols() as i32,
        scale: n.scale,
        softcap: n.softcap,
        window: n.window,
    };
    if tensor_cores(cx, n, &[qkv, cache])? {
        return kernels::attention_mma_paged(&*cx.device, blocks(qkv, n.kv_heads), n.d, args);
    }
    kernels::attention_paged_fwd(&*cx.device, Launch::flat(rows * n.heads as usize), n.d, args)
}

/// Whether the kernel for rows of distinct sequences can take these.
pub(super) fn decodes(cx: &Cx, n: &Numbers, qkv: &Tensor, cache: &Tensor) -> Result<bool> {
    let fits = kernels::ATTENTION_DECODE_D.contains(&n.d)
        && (n.heads / n.kv_heads) as usize <= kernels::DECODE_HEADS;
    Ok(tensor_cores(cx, n, &[qkv, cache])? && fits)
}

/// Bytes that a multiprocessor without a block of attention prefetches: its share of what memory gives
/// during the shortest attention and the product behind it. Far more would outlast them.
const IDLE_PREFETCHES: usize = 160 << 10;

/// Cache lines that multiprocessors without one of `blocks` fetch of the next weights, of so many
/// bytes.
fn next_lines(blocks: usize, bytes: [usize; 2], device: &Capabilities) -> [i32; 2] {
    let idle = device.multiprocessors.saturating_sub(blocks);
    let mut room = most_prefetched(device).min(idle * IDLE_PREFETCHES);
    bytes.map(|bytes| {
        let bytes = bytes.min(room);
        room -= bytes;
        (bytes / LINE) as i32
    })
}

/// Blocks for heads of `d`: with twice as many warps where there are few blocks and the device has the
/// shared memory.
fn decode_launch(blocks: usize, d: usize, device: &Capabilities) -> Launch {
    let one = kernels::decode_warps(d);
    let shared = |warps| kernels::decode_block_shared(d) + warps * kernels::decode_warp_shared(d);
    let few = blocks <= device.multiprocessors;
    let warps = if few && shared(2 * one) <= device.shared { 2 * one } else { one };
    Launch::blocks([blocks, 1, 1], 32 * warps as u32, shared(warps))
}

/// Attention of rows of distinct sequences, where [`decodes`] allows it. With `rope` q and k are
/// normed and rotated and k and v appended first; without it they have been.
pub(super) fn decode(
    cx: &Cx,
    n: &Numbers,
    out: &Tensor,
    [qkv, cache]: [&Tensor; 2],
    rows: PagedRows,
    rope: Option<(RopeArgs<Tensor>, Option<Norm>)>,
    next: [Option<&Tensor>; 2],
) -> Result<()> {
    let slots = rope.is_some().then_some(rows.slots);
    let (rope, norm) = rope.map_or((None, None), |(rope, norm)| (Some(rope), norm));
    let norm = norm.unwrap_or(Norm::new(0.0));
    let blocks = qkv.row_count() * n.kv_heads as usize;
    let device = cx.device.capabilities();
    let mut at = decode_launch(blocks, n.d, &device);
    let lines = next_lines(blocks, next.map(|t| t.map_or(0, Tensor::bytes)), &device);
    if lines != [0, 0] {
        at.grid[0] = device.multiprocessors as u32;
    }
    let args = AttentionDecodeArgs {
        out: out.out(),
        qkv,
        cache: cache.out(),
        page_table: rows.page_table,
        row_sequence: rows.sequences,
        row_position: rows.positions,
        slots,
        cosine: rope.as_ref().and_then(|r| r.cosine),
        sine: rope.as_ref().and_then(|r| r.sine),
        wq: rope.as_ref().and_then(|r| r.wq),
        wk: rope.as_ref().and_then(|r| r.wk),
        next0: next[0],
        next1: next[1],
        lines0: lines[0],
        lines1: lines[1],
        blocks: blocks as i32,
        ld: qkv.stride() as i32,
        heads: n.heads,
        kv_heads: n.kv_heads,
        max_pages: rows.page_table.cols() as i32,
        scale: n.scale,
        softcap: n.softcap,
        window: n.window,
        eps: norm.eps,
        plus: norm.plus(),
        once: norm.once(),
    };
    kernels::attention_decode(&*cx.device, at, n.d, args)
}

pub(super) fn backward(
    cx: &Cx,
    n: &Numbers,
    dqkv: &Tensor,
    dout: &Tensor,
    [qkv, out, lse]: [&Tensor; 3],
    plan: &AttnPlan,
    accumulate: bool,
) -> Result<()> {
    let (t, dev) = (plan.tables(cx)?, &*cx.device);
    let (ld, rows, accumulate) = (qkv.stride() as i32, plan.rows as i32, i32::from(accumulate));
    let family = tensor_cores(cx, n, &[qkv, dqkv, dout, out])?;
    if family && wgmma(cx, n, &kernels::ATTENTION_HOPPER_DQ_D)? {
        // Each segment's stats begin at a multiple of four.
        let stat_rows = plan.rows.next_multiple_of(4) + 4 * plan.segments.len();
        let shape = [2 * n.heads as usize, stat_rows];
        let stats = &cx.scratch("attention stats", DType::F32, &shape)?;
        let (queries, keys) = (&t.wide_tiles, &t.wide_key_tiles);
        let args = AttentionHopperDqArgs {
            dqkv: dqkv.out(),
            stats: stats.out(),
            dout,
            qkv,
            out,
            lse,
            items: queries,
            segments: &t.segments,
            tiles: queries.row_count() as i32,
            stat_rows: stat_rows as i32,
            ld,
            heads: n.heads,
            kv_heads: n.kv_heads,
            scale: n.scale,
            softcap: n.softcap,
            window: n.window,
            accumulate,
        };
        let turns = queries.row_count() * n.heads as usize;
        let at = Launch::grid([turns.min(cx.device.capabilities().multiprocessors), 1, 1]);
        kernels::attention_hopper_dq(dev, at, n.d, args)?;
        let args = AttentionHopperDkvArgs {
            dqkv: dqkv.out(),
            dout,
            qkv,
            stats,
            items: keys,
            segments: &t.segments,
            children: &t.children,
            stat_rows: stat_rows as i32,
            ld,
            heads: n.heads,
            kv_heads: n.kv_heads,
            scale: n.scale,
            softcap: n.softcap,
            window: n.window,
            accumulate,
        };
        return kernels::attention_hopper_dkv(dev, blocks(keys, n.kv_heads), n.d, args);
    }
    let delta = &cx.scratch("attention delta", DType::F32, lse.shape())?;
    let count = lse.numel() as i32;
    let args = AttentionDeltaArgs { delta: delta.out(), dout, out, count };
    kernels::attention_delta(dev, Launch::flat(lse.numel()), n.d, args)?;
    let args = AttentionDkvArgs {
        dqkv: dqkv.out(),
        dout,
        qkv,
        lse,
        delta,
        items: &t.row_segment,
        segments: &t.segments,
        children: &t.children,
        rows,
        ld,
        heads: n.heads,
        kv_heads: n.kv_heads,
        scale: n.scale,
        softcap: n.softcap,
        window: n.window,
        accumulate,
    };
    if family {
        let (queries, keys) = (&t.query_tiles, &t.key_tiles);
        let at = blocks(queries, n.heads);
        let tiles = AttentionDkvArgs { items: queries, ..args };
        kernels::attention_mma_dq(dev, at, n.d, tiles)?;
        let at = blocks(keys, n.kv_heads * kernels::mma_dkv_parts(n.d) as i32);
        let tiles = AttentionDkvArgs { items: keys, ..args };
        return kernels::attention_mma_dkv(dev, at, n.d, tiles);
    }
    kernels::attention_dq(dev, Launch::flat(plan.rows * n.heads as usize), n.d, args)?;
    kernels::attention_dkv(dev, Launch::flat(plan.rows * n.kv_heads as usize), n.d, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_idle_multiprocessors_fetch_the_next_weights() {
        let lines = |blocks, bytes| next_lines(blocks, bytes, &Capabilities::GPU);
        let (o, gate_up) = (896 * 896 * 2, 9728 * 896 * 2);
        assert_eq!(lines(2, [o, gate_up]), [12_544, 136_192]); // all of both
        assert_eq!(lines(128, [o, gate_up]), [5_120, 0]); // 640 KiB by four multiprocessors
        assert_eq!(lines(132, [o, gate_up]), [0, 0]);
        assert_eq!(lines(2048, [o, gate_up]), [0, 0]);
        assert_eq!(lines(2, [0, 64 << 20]), [0, (20 << 20) / LINE as i32]);
    }

    #[test]
    fn a_block_of_a_decoding_step_fits_into_the_shared_memory_of_every_target() {
        // sm_80, sm_86 and newer without Hopper, sm_90
        for shared in [163 << 10, 99 << 10, 227 << 10] {
            let device = Capabilities { shared, ..Capabilities::GPU };
            for d in kernels::ATTENTION_DECODE_D {
                for blocks in [1, 132, 133, 2048] {
                    let at = decode_launch(blocks, d, &device);
                    assert!(at.shared as usize <= shared, "{d}, {blocks} blocks: {at:?}");
                }
            }
        }
        let warps = |blocks| decode_launch(blocks, 64, &Capabilities::GPU).block / 32;
        assert_eq!([warps(132), warps(133)], [8, 4]);
    }
}
