//! Which attention kernels run, and on what grid. Layer 4.
//!
//! Invariant: the family depends on the context and the dtype alone, so forward, backward and
//! decode agree.

use super::plan::{AttnPlan, TILE};
use super::{Numbers, PAGE};
use crate::autograd::Cx;
use crate::config::AttentionChoice;
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels;
use crate::tensor::Tensor;

fn tensor_cores(cx: &Cx, n: &Numbers, tensors: &[&Tensor]) -> Result<bool> {
    let bf16 = tensors[0].dtype() == DType::BF16;
    let chosen = match cx.attention {
        AttentionChoice::Simt => false,
        AttentionChoice::Auto => bf16 && cx.device.capabilities().tensor_cores,
        AttentionChoice::TensorCore => true,
    };
    if chosen && !bf16 {
        let what = tensors[0].dtype().name();
        return Err(Error::op(
            "attention",
            format!("tensor-core attention takes bfloat16, not {what}; choose simt"),
        ));
    }
    if chosen && n.heads / n.kv_heads > TILE as i32 {
        return Err(Error::op(
            "attention",
            format!("more than {TILE} heads a key-value head; choose simt"),
        ));
    }
    // Rows are copied 16 bytes at once.
    match tensors.iter().find(|t| t.address() % 16 != 0 || t.stride() % 8 != 0) {
        Some(t) if chosen => {
            Err(Error::op("attention", format!("{t:?} has rows that are not 16-byte aligned")))
        }
        _ => Ok(chosen),
    }
}

/// A block of 128 threads with `rows` rows of padded tiles in shared memory.
fn blocks(count: usize, rows: usize, d: usize) -> Launch {
    Launch::blocks([count, 1, 1], 128, rows * (d + 8) * 2)
}

pub(super) fn forward(
    cx: &Cx,
    n: &Numbers,
    out: &Tensor,
    lse: Option<&Tensor>,
    qkv: &Tensor,
    plan: &AttnPlan,
) -> Result<()> {
    let (t, dev, ld) = (plan.tables(cx)?, &*cx.device, qkv.stride() as i32);
    let lse = lse.map(Tensor::out);
    let (h, k, scale, softcap, window) = (n.heads, n.kv_heads, n.scale, n.softcap, n.window);
    if tensor_cores(cx, n, &[qkv])? {
        let at = blocks(t.query_tiles.row_count() * h as usize, 3 * TILE, n.d);
        let (tiles, table) = (&t.query_tiles, &t.segments);
        return kernels::attention_mma_fwd(
            dev,
            at,
            n.d,
            out.out(),
            lse,
            qkv,
            tiles,
            table,
            ld,
            h,
            k,
            scale,
            softcap,
            window,
        );
    }
    let (at, rows) = (Launch::flat(plan.rows * h as usize), plan.rows as i32);
    let (row_segment, table) = (&t.row_segment, &t.segments);
    kernels::attention_fwd(
        dev,
        at,
        n.d,
        out.out(),
        lse,
        qkv,
        row_segment,
        table,
        rows,
        ld,
        h,
        k,
        scale,
        softcap,
        window,
    )
}

/// `x`: qkv, cache, page table, sequence and position of each row.
pub(super) fn paged(cx: &Cx, n: &Numbers, out: &Tensor, x: &[&Tensor]) -> Result<()> {
    let (qkv, cache, pages, sequence, position) = (x[0], x[1], x[2], x[3], x[4]);
    debug_assert_eq!(PAGE, TILE);
    let (rows, ld, max_pages) = (qkv.row_count(), qkv.stride() as i32, pages.cols() as i32);
    let mma = tensor_cores(cx, n, &[qkv, cache])?;
    let at = if mma {
        blocks(rows * n.kv_heads as usize, 3 * TILE, n.d)
    } else {
        Launch::flat(rows * n.heads as usize)
    };
    let kernel = if mma { kernels::attention_mma_paged } else { kernels::attention_paged_fwd };
    kernel(
        &*cx.device,
        at,
        n.d,
        out.out(),
        qkv,
        cache,
        pages,
        sequence,
        position,
        rows as i32,
        ld,
        n.heads,
        n.kv_heads,
        max_pages,
        n.scale,
        n.softcap,
        n.window,
    )
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
    let (t, dev, ld) = (plan.tables(cx)?, &*cx.device, qkv.stride() as i32);
    let delta = &cx.scratch("attention delta", DType::F32, lse.shape())?;
    let (h, k, scale, softcap, window) = (n.heads, n.kv_heads, n.scale, n.softcap, n.window);
    let accumulate = i32::from(accumulate);
    kernels::attention_delta(
        dev,
        Launch::flat(lse.numel()),
        n.d,
        delta.out(),
        dout,
        out,
        lse.numel() as i32,
    )?;
    let (table, children) = (&t.segments, &t.children);
    if tensor_cores(cx, n, &[qkv, dqkv, dout])? {
        // Steps of 64 or 32 and the split in two: as in kernels/attention_mma.cu.
        let step = if n.d <= 128 { 64 } else { 32 };
        let at = blocks(t.query_tiles.row_count() * h as usize, 2 * (TILE + step), n.d);
        let tiles = &t.query_tiles;
        kernels::attention_mma_dq(
            dev,
            at,
            n.d,
            dqkv.out(),
            dout,
            qkv,
            lse,
            delta,
            tiles,
            table,
            ld,
            h,
            k,
            scale,
            softcap,
            window,
            accumulate,
        )?;
        let (step, parts) =
            (if n.d > 80 || n.d == 32 { 32 } else { 64 }, if n.d <= 128 { 1 } else { 2 });
        let at = blocks(t.key_tiles.row_count() * k as usize * parts, 2 * (TILE + step), n.d);
        let tiles = &t.key_tiles;
        return kernels::attention_mma_dkv(
            dev,
            at,
            n.d,
            dqkv.out(),
            dout,
            qkv,
            lse,
            delta,
            tiles,
            table,
            children,
            ld,
            h,
            k,
            scale,
            softcap,
            window,
            accumulate,
        );
    }
    let (row_segment, rows) = (&t.row_segment, plan.rows as i32);
    let at = Launch::flat(plan.rows * h as usize);
    kernels::attention_dq(
        dev,
        at,
        n.d,
        dqkv.out(),
        dout,
        qkv,
        lse,
        delta,
        row_segment,
        table,
        rows,
        ld,
        h,
        k,
        scale,
        softcap,
        window,
        accumulate,
    )?;
    let at = Launch::flat(plan.rows * k as usize);
    kernels::attention_dkv(
        dev,
        at,
        n.d,
        dqkv.out(),
        dout,
        qkv,
        lse,
        delta,
        row_segment,
        table,
        children,
        rows,
        ld,
        h,
        k,
        scale,
        softcap,
        window,
        accumulate,
    )
}
