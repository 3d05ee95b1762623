//! The tape: a list of what was computed, as data, from which gradients are computed backwards.
//! Layer 3.
//!
//! Invariant: a node owns all that its backward needs; a node's memory is freed as soon as its
//! backward has run, but for outputs that their ops make again ([`Op::recomputes_output`]). A
//! checkpointed segment keeps only the values that enter it and runs its own
//! forward again, from the same data, so the gradients have the same bits as without checkpointing.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::ops::{Index, IndexMut};
use std::sync::Arc;

use super::accumulate::add_into;
use super::context::Cx;
use super::op::{Need, Op};
use crate::device::{DType, Pool};
use crate::error::{Error, Result};
use crate::tensor::{Dims, Id, ParamSetId, Tensor};

pub struct Node {
    pub op: Arc<dyn Op>,
    pub inputs: Vec<Input>,
    pub outputs: Vec<u32>,
    /// What the op's forward kept for its backward. Empty while its segment waits for
    /// recomputation.
    pub saved: Vec<Tensor>,
    /// What was taken out of `saved` because the op that made it makes it again, in order.
    omitted: Vec<Omitted>,
    segment: Option<usize>,
}

/// A tensor that belongs in a node's `saved`.
struct Omitted {
    slot: usize,
    value: u32,
    shape: Dims,
}

pub struct Input {
    pub id: Id,
    pub dtype: DType,
    pub shape: Dims,
    pub needs_grad: bool,
    /// Kept for constants and parameters (their memory lives on anyway); None for values of the
    /// tape.
    tensor: Option<Tensor>,
}

#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    values: u32,
    segments: Vec<Segment>,
    open: Option<usize>,
    /// Values that their ops can make again: node, output and number of elements.
    remakable: HashMap<u32, (usize, usize, usize)>,
}

#[derive(Default)]
struct Segment {
    first: usize,
    dropped: bool,
    /// Values made outside that nodes inside read.
    boundary: HashMap<u32, Tensor>,
}

impl Tape {
    /// Records one application and gives its outputs their ids. With `light`, what an earlier op
    /// can make again is not kept: see [`Op::recomputes_output`].
    pub fn push(
        &mut self,
        op: Arc<dyn Op>,
        x: &[&Tensor],
        need: &Need,
        outputs: &mut [Tensor],
        mut saved: Vec<Tensor>,
        light: bool,
    ) {
        let first_inside = self.open.map(|s| self.segments[s].first);
        let mut inputs = Vec::with_capacity(x.len());
        for (t, needs_grad) in x.iter().zip(&need.inputs) {
            if let (Id::Value(v), Some(s), Some(first)) = (t.id(), self.open, first_inside) {
                let inside = self.nodes[first..].iter().any(|n| n.outputs.contains(&v));
                if !inside {
                    self.segments[s].boundary.entry(v).or_insert_with(|| (*t).clone());
                }
            }
            let tensor = if matches!(t.id(), Id::Value(_)) { None } else { Some((*t).clone()) };
            inputs.push(Input {
                id: t.id(),
                dtype: t.dtype(),
                shape: t.dims(),
                needs_grad: *needs_grad,
                tensor,
            });
        }
        let omitted = if light { self.omit(&mut saved) } else { Vec::new() };
        let mut ids = Vec::with_capacity(outputs.len());
        for (k, t) in outputs.iter_mut().enumerate() {
            if light && op.recomputes_output(k) {
                self.remakable.insert(self.values, (self.nodes.len(), k, t.numel()));
            }
            ids.push(self.values);
            *t = t.clone().with_id(Id::Value(self.values));
            self.values += 1;
        }
        self.nodes.push(Node { op, inputs, outputs: ids, saved, omitted, segment: self.open });
    }

    /// Takes what can be made again out of `saved`.
    fn omit(&self, saved: &mut Vec<Tensor>) -> Vec<Omitted> {
        let of = |t: &Tensor| {
            let Id::Value(value) = t.id() else { return None };
            let (.., numel) = self.remakable.get(&value)?;
            (*numel == t.numel()).then_some(value)
        };
        let omitted: Vec<Omitted> = saved
            .iter()
            .enumerate()
            .filter_map(|(slot, t)| of(t).map(|value| Omitted { slot, value, shape: t.dims() }))
            .collect();
        for one in omitted.iter().rev() {
            saved.remove(one.slot);
        }
        omitted
    }

    /// Puts back what was taken out of a node's `saved`. `made` holds what was made again until the
    /// op that made it has run backwards.
    fn restore(&self, cx: &mut Cx, node: &mut Node, made: &mut HashMap<u32, Tensor>) -> Result<()> {
        for one in std::mem::take(&mut node.omitted) {
            if let std::collections::hash_map::Entry::Vacant(e) = made.entry(one.value)
                && let Some((maker, k, _)) = self.remakable.get(&one.value)
            {
                let maker = &self.nodes[*maker];
                e.insert(maker.op.recompute_output(cx, maker, *k)?);
            }
            let tensor = made[&one.value].reshape(&one.shape)?;
            node.saved.insert(one.slot, tensor);
        }
        Ok(())
    }

    /// From here to [`Tape::end_segment`] nothing is kept but what enters: it is computed again on
    /// the way back.
    pub fn begin_segment(&mut self) {
        self.open = Some(self.segments.len());
        self.segments.push(Segment { first: self.nodes.len(), ..Segment::default() });
    }

    pub fn end_segment(&mut self) {
        if let Some(s) = self.open.take() {
            for node in &mut self.nodes[self.segments[s].first..] {
                node.saved.clear();
            }
            self.segments[s].dropped = true;
        }
    }

    /// One line a node: op, input and output shapes, bytes held.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        // Nodes share what they hold (one's output is the next one's input): the total counts each
        // address once.
        let mut unique: HashMap<u64, usize> = HashMap::new();
        let mut keep = |t: &Tensor| {
            let bytes = unique.entry(t.address()).or_default();
            *bytes = t.bytes().max(*bytes);
        };
        for (i, node) in self.nodes.iter().enumerate() {
            let held: usize = node.saved.iter().map(|t| t.bytes()).sum();
            node.saved.iter().for_each(&mut keep);
            let shapes: Vec<String> = node
                .inputs
                .iter()
                .map(|x| {
                    let id = match x.id {
                        Id::Constant => "c".to_string(),
                        Id::Value(v) => format!("%{v}"),
                        Id::Param { set, index } => format!("p{}.{index}", set as usize),
                    };
                    format!("{id}{:?}", x.shape)
                })
                .collect();
            let outs: Vec<String> = node.outputs.iter().map(|v| format!("%{v}")).collect();
            let segment = node.segment.map(|s| format!("  segment {s}")).unwrap_or_default();
            let _ = writeln!(
                text,
                "{i:4}  {} = {}({})  holds {held} bytes{segment}",
                outs.join(", "),
                node.op.name(),
                shapes.join(", ")
            );
        }
        for (s, segment) in self.segments.iter().enumerate() {
            let held: usize = segment.boundary.values().map(|t| t.bytes()).sum();
            segment.boundary.values().for_each(&mut keep);
            let _ = writeln!(text, "segment {s} keeps {held} bytes at its entry");
        }
        let total: usize = unique.values().sum();
        let _ = writeln!(
            text,
            "{} nodes hold {total} bytes, shared ones counted once",
            self.nodes.len()
        );
        text
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Walks the tape backwards from `seeds` (a value and its upstream gradient) and adds up
    /// parameter gradients in `cx.param_grads`. The tape is consumed.
    pub fn backward(mut self, cx: &mut Cx, seeds: Vec<(Tensor, Tensor)>) -> Result<()> {
        self.end_segment();
        let mut values: HashMap<u32, Tensor> = HashMap::new();
        for (value, grad) in seeds {
            if let Id::Value(v) = value.id() {
                values.insert(v, grad);
            }
        }
        let mut made: HashMap<u32, Tensor> = HashMap::new();
        while let Some(mut node) = self.nodes.pop() {
            if let Some(s) = node.segment
                && self.segments[s].dropped
            {
                self.nodes.push(node);
                self.recompute(cx, s)?;
                node = self
                    .nodes
                    .pop()
                    .ok_or_else(|| Error::Device("tape: an empty segment".into()))?;
            }
            let dy: Vec<Option<Tensor>> = node.outputs.iter().map(|v| values.remove(v)).collect();
            node.outputs.iter().for_each(|v| drop(made.remove(v)));
            if dy.iter().all(Option::is_none) {
                continue;
            }
            self.restore(cx, &mut node, &mut made)?;
            let mut params = std::mem::take(&mut cx.param_grads);
            let mut grads = Grads {
                pool: cx.pool.clone(),
                values: &mut values,
                params: &mut params,
                inputs: &node.inputs,
            };
            let result = node.op.backward(cx, &node, &dy, &mut grads);
            cx.param_grads = params;
            result?;
        }
        Ok(())
    }

    /// Runs a dropped segment's forward again and fills in what its nodes save.
    fn recompute(&mut self, cx: &mut Cx, s: usize) -> Result<()> {
        let first = self.segments[s].first;
        let mut known = std::mem::take(&mut self.segments[s].boundary);
        self.segments[s].dropped = false;
        for node in &mut self.nodes[first..] {
            let mut x: Vec<Tensor> = Vec::with_capacity(node.inputs.len());
            for input in &node.inputs {
                let tensor = match input.id {
                    Id::Value(v) => known.get(&v).cloned(),
                    _ => input.tensor.clone(),
                };
                x.push(tensor.ok_or_else(|| {
                    Error::Device("tape: a value is missing for recomputation".into())
                })?);
            }
            let need =
                Need { tape: true, inputs: node.inputs.iter().map(|i| i.needs_grad).collect() };
            let refs: Vec<&Tensor> = x.iter().collect();
            let fwd = node.op.forward(cx, &refs, &need)?;
            node.saved = fwd.saved;
            for (v, t) in node.outputs.iter().zip(fwd.outputs) {
                known.insert(*v, t.with_id(Id::Value(*v)));
            }
        }
        Ok(())
    }
}

/// Gradient buffers of one parameter set: views of one f32 arena, in parameter order; None where
/// frozen.
#[derive(Default)]
pub struct ParamGrads {
    pub slots: Vec<Option<Tensor>>,
    /// True once something was written since the last [`ParamGrads::reset`]: later writers add.
    pub touched: Vec<bool>,
}

impl ParamGrads {
    pub fn new(slots: Vec<Option<Tensor>>) -> Self {
        ParamGrads { touched: vec![false; slots.len()], slots }
    }

    /// Starts a new step. Nothing is cleared: the first writer overwrites.
    pub fn reset(&mut self) {
        self.touched.fill(false);
    }

    /// The buffer of a parameter and whether to add to it; None if it is frozen. Marks it as
    /// written.
    pub fn slot(&mut self, index: u32) -> Option<(Tensor, bool)> {
        let tensor = self.slots.get(index as usize)?.clone()?;
        let accumulate = std::mem::replace(&mut self.touched[index as usize], true);
        Some((tensor, accumulate))
    }

    /// Zeros what no node has written, so that the optimizer sees whole gradients.
    pub fn finish(&mut self) -> Result<()> {
        for (slot, touched) in self.slots.iter().zip(&mut self.touched) {
            if let (Some(t), false) = (slot, std::mem::replace(touched, true)) {
                t.zero()?;
            }
        }
        Ok(())
    }
}

/// Gradient buffers by parameter set; a set that is not trained has none.
#[derive(Default)]
pub struct ParamGradSets([ParamGrads; ParamSetId::COUNT]);

impl Index<ParamSetId> for ParamGradSets {
    type Output = ParamGrads;

    fn index(&self, set: ParamSetId) -> &ParamGrads {
        &self.0[set as usize]
    }
}

impl IndexMut<ParamSetId> for ParamGradSets {
    fn index_mut(&mut self, set: ParamSetId) -> &mut ParamGrads {
        &mut self.0[set as usize]
    }
}

/// Where a node's backward puts the gradients of its inputs.
pub struct Grads<'a> {
    pool: Arc<Pool>,
    values: &'a mut HashMap<u32, Tensor>,
    params: &'a mut ParamGradSets,
    inputs: &'a [Input],
}

impl Grads<'_> {
    pub fn wants(&self, i: usize) -> bool {
        self.inputs[i].needs_grad
    }

    /// The gradient buffer of input `i` and whether to add to what is there; None if no gradient is
    /// wanted. The caller writes (or adds to) every element. Values have the input's dtype,
    /// parameters f32.
    pub fn slot(&mut self, i: usize) -> Result<Option<(Tensor, bool)>> {
        let input = &self.inputs[i];
        if !input.needs_grad {
            return Ok(None);
        }
        match input.id {
            Id::Constant => Ok(None),
            Id::Param { set, index } => Ok(self.params[set].slot(index)),
            Id::Value(v) => {
                if let Some(t) = self.values.remove(&v) {
                    // Another value may share this gradient's buffer: adding to it needs a copy.
                    let own = if t.is_unique() {
                        t
                    } else {
                        let copy = Tensor::new(
                            &self.pool,
                            "activation gradients",
                            input.dtype,
                            &input.shape,
                        )?;
                        copy.copy_from(&t)?;
                        copy
                    };
                    self.values.insert(v, own.clone());
                    return Ok(Some((own, true)));
                }
                let t = Tensor::new(&self.pool, "activation gradients", input.dtype, &input.shape)?;
                self.values.insert(v, t.clone());
                Ok(Some((t, false)))
            }
        }
    }

    /// Hands over a ready gradient of input `i`: for alias nodes and ops that computed it in their
    /// forward.
    pub fn give(&mut self, cx: &mut Cx, i: usize, grad: Tensor) -> Result<()> {
        let input = &self.inputs[i];
        let grad = grad.reshape(&input.shape)?;
        if let (true, Id::Value(v)) = (input.needs_grad, input.id)
            && let std::collections::hash_map::Entry::Vacant(e) = self.values.entry(v)
        {
            e.insert(grad);
            return Ok(());
        }
        match self.slot(i)? {
            Some((slot, accumulate)) => add_into(cx, &slot, &grad, accumulate),
            None => Ok(()),
        }
    }
}
