//! The tape: the list of recorded ops, over which the backward pass runs. Layer 3.
//!
//! Invariant: a node owns everything that its backward needs. The memory of a node is freed as soon
//! as its backward has run, except for outputs that their ops recompute
//! ([`Op::recomputes_output`]). A checkpointed segment keeps only the values that enter it and
//! repeats its forward from the same data, so the gradients have the same bits as without
//! checkpointing.

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
    /// The tensors that the forward kept for the backward. Empty while the segment waits for
    /// recomputation.
    pub saved: Vec<Tensor>,
    /// Tensors that were removed from `saved` because the op that made them can recompute them.
    /// Sorted by slot.
    omitted: Vec<Omitted>,
    segment: Option<usize>,
}

/// Describes a tensor that was removed from a node's `saved`.
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
    /// Kept for constants and parameters, whose memory stays allocated anyway. None for values of
    /// the tape.
    tensor: Option<Tensor>,
}

#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    values: u32,
    segments: Vec<Segment>,
    open: Option<usize>,
    /// Values that their ops can recompute: node, output and number of elements.
    remakable: HashMap<u32, (usize, usize, usize)>,
}

#[derive(Default)]
struct Segment {
    first: usize,
    dropped: bool,
    /// Values from outside the segment that nodes inside read.
    boundary: HashMap<u32, Tensor>,
}

impl Tape {
    /// Records one application of an op and gives the outputs their ids. With `light`, tensors that
    /// an earlier op can recompute are not kept; see [`Op::recomputes_output`].
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

    /// Removes from `saved` what can be recomputed, and describes what was removed.
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

    /// Puts back what [`Tape::omit`] removed from a node's `saved`. `made` keeps a recomputed
    /// tensor until the backward of the op that made it has run.
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

    /// Starts a checkpointed segment, which ends at [`Tape::end_segment`]. Only the values that
    /// enter it are kept; the backward pass recomputes the others.
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

    /// One line for each node: op, shapes of inputs and outputs, bytes held.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        // Nodes share tensors (the output of one is the input of the next), so the total counts
        // each address once.
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

    /// Runs the backward pass from `seeds` (a value and its gradient) and accumulates the gradients
    /// of parameters in `cx.param_grads`. Consumes the tape.
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

    /// Repeats the forward of a dropped segment and restores what its nodes save.
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

/// Gradient buffers of one parameter set: views of one f32 arena, in the order of the parameters.
/// None for a frozen parameter.
#[derive(Default)]
pub struct ParamGrads {
    pub slots: Vec<Option<Tensor>>,
    /// True if the buffer was written since the last [`ParamGrads::reset`], so later writers add to
    /// it.
    pub touched: Vec<bool>,
}

impl ParamGrads {
    pub fn new(slots: Vec<Option<Tensor>>) -> Self {
        ParamGrads { touched: vec![false; slots.len()], slots }
    }

    /// Starts a new step. Nothing is cleared, because the first writer overwrites.
    pub fn reset(&mut self) {
        self.touched.fill(false);
    }

    /// The buffer of a parameter, and whether to add to it. None if the parameter is frozen. Marks
    /// the buffer as written.
    pub fn slot(&mut self, index: u32) -> Option<(Tensor, bool)> {
        let tensor = self.slots.get(index as usize)?.clone()?;
        let accumulate = std::mem::replace(&mut self.touched[index as usize], true);
        Some((tensor, accumulate))
    }

    /// Zeros the buffers that no node has written, so that the optimizer reads defined gradients.
    pub fn finish(&mut self) -> Result<()> {
        for (slot, touched) in self.slots.iter().zip(&mut self.touched) {
            if let (Some(t), false) = (slot, std::mem::replace(touched, true)) {
                t.zero()?;
            }
        }
        Ok(())
    }
}

/// Gradient buffers by parameter set. A set that is not trained has no buffers.
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

/// The destination of the gradients of a node's inputs.
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

    /// The gradient buffer of input `i`, and whether to add to its contents. None if the input
    /// needs no gradient. The caller writes (or adds to) every element. The gradient of a value has
    /// the dtype of the input, that of a parameter is f32.
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
                    // The buffer may also be the gradient of another value: copy it before adding.
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

    /// Accepts a finished gradient of input `i`: for nodes that alias their input, and for ops that
    /// computed the gradient in their forward.
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
