//! Views of device memory. Layer 1.
//!
//! Invariant: a [`Tensor`] is a block, an offset, a dtype, a shape and a row stride; its last
//! dimension is contiguous. A clone shares the memory, which returns to the pool when the last view
//! is dropped.

mod dims;
pub mod safetensors;

use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;
use half::bf16;

use crate::device::{Block, DType, Device, Download, Pool};
use crate::error::{Error, Result};

pub use dims::Dims;

/// A set of parameters with weights of its own and, if it is trained, gradients of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ParamSetId {
    Model,
    Adapter,
    /// A frozen model beside the policy: the reference, or the teacher of distillation.
    Reference,
    /// The value model, or value head, of PPO.
    Value,
    Reward,
}

impl ParamSetId {
    pub const COUNT: usize = 5;
}

/// The role of a tensor on the tape: a constant, a value of the tape, or a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Id {
    Constant,
    Value(u32),
    Param { set: ParamSetId, index: u32 },
}

#[derive(Clone)]
pub struct Tensor {
    block: Arc<Block>,
    offset: usize, // bytes
    dtype: DType,
    shape: Dims,
    stride: usize, // elements from one row to the next; a row is the last dimension
    id: Id,
}

/// A copy of a tensor to the host that has begun.
pub struct PendingDownload {
    device: Arc<dyn Device>,
    bytes: usize,
    download: Option<Download>,
}

impl PendingDownload {
    /// The values. Waits for the copy, but not for work that was queued after it. `T` has the
    /// dtype's size.
    pub fn wait<T: Pod>(mut self) -> Result<Vec<T>> {
        let mut out = vec![T::zeroed(); self.bytes / size_of::<T>()];
        if let Some(download) = self.download.take() {
            self.device.end_download(download, bytemuck::cast_slice_mut(&mut out))?;
        }
        Ok(out)
    }
}

impl Drop for PendingDownload {
    fn drop(&mut self) {
        if let Some(download) = self.download.take() {
            // Nobody reads the values. An error belongs to earlier work, and the next call returns
            // it again.
            let _ = self.device.end_download(download, &mut []);
        }
    }
}

/// Marks the tensor of a kernel argument as written.
#[derive(Clone, Copy)]
pub struct Out<'a>(pub &'a Tensor);

impl Tensor {
    /// New memory from the pool; contents undefined.
    pub fn new(pool: &Arc<Pool>, name: &str, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let numel: usize = shape.iter().product();
        let block = pool.alloc(name, numel * dtype.size())?;
        Ok(Tensor {
            block,
            offset: 0,
            dtype,
            shape: Dims::of(shape)?,
            stride: *shape.last().unwrap_or(&1),
            id: Id::Constant,
        })
    }

    /// A new tensor with the values of `data`. `T` has the dtype's size.
    pub fn from_host<T: Pod>(
        pool: &Arc<Pool>,
        name: &str,
        dtype: DType,
        shape: &[usize],
        data: &[T],
    ) -> Result<Tensor> {
        let t = Tensor::new(pool, name, dtype, shape)?;
        t.upload(data)?;
        Ok(t)
    }

    /// A new tensor of `dtype` F32 or BF16 with the values of `data` (rounded to nearest even).
    pub fn from_f32(
        pool: &Arc<Pool>,
        name: &str,
        dtype: DType,
        shape: &[usize],
        data: &[f32],
    ) -> Result<Tensor> {
        match dtype {
            DType::BF16 => {
                let half: Vec<bf16> = data.iter().map(|v| bf16::from_f32(*v)).collect();
                Tensor::from_host(pool, name, dtype, shape, &half)
            }
            _ => Tensor::from_host(pool, name, dtype, shape, data),
        }
    }

    /// Overwrites a contiguous tensor with host values. Error: the sizes differ.
    pub fn upload<T: Pod>(&self, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        if bytes.len() != self.numel() * self.dtype.size() || !self.is_contiguous() {
            return Err(Error::Device(format!(
                "upload to {}: {} bytes for shape {:?} of {}",
                self.name(),
                bytes.len(),
                self.shape,
                self.dtype.name()
            )));
        }
        // SAFETY: the view lies in its block by construction, and the sizes agree.
        unsafe { self.device().upload(self.address(), bytes) }
    }

    /// The values in the tensor's dtype; `T` has its size. Waits for all earlier work.
    pub fn to_vec<T: Pod>(&self) -> Result<Vec<T>> {
        if size_of::<T>() != self.dtype.size() {
            return Err(Error::Device(format!(
                "{}: {} read as values of {} bytes",
                self.name(),
                self.dtype.name(),
                size_of::<T>()
            )));
        }
        let mut out = vec![T::zeroed(); self.numel()];
        let row = self.cols().max(1);
        if self.is_contiguous() {
            // SAFETY: the view lies in its block by construction.
            unsafe { self.device().download(bytemuck::cast_slice_mut(&mut out), self.address())? };
        } else {
            for (r, dst) in out.chunks_exact_mut(row).enumerate() {
                let src = self.address() + (r * self.stride * self.dtype.size()) as u64;
                // SAFETY: as above, row by row.
                unsafe { self.device().download(bytemuck::cast_slice_mut(dst), src)? };
            }
        }
        Ok(out)
    }

    /// Queues a copy of a contiguous tensor to the host behind all earlier work and returns at
    /// once. Work that is queued later may overwrite the tensor.
    pub fn begin_download(&self) -> Result<PendingDownload> {
        if !self.is_contiguous() {
            return Err(Error::Device(format!("{self:?} has gaps: it cannot be read in one copy")));
        }
        // SAFETY: the view lies in its block by construction.
        let download = unsafe { self.device().begin_download(self.address(), self.bytes())? };
        Ok(PendingDownload {
            device: self.device().clone(),
            bytes: self.bytes(),
            download: Some(download),
        })
    }

    /// The bytes of a contiguous tensor, in the format that [`Tensor::upload`] reads.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.view(0, DType::U8, &[self.bytes()])?.to_vec()
    }

    /// The values of an F32 or BF16 tensor as f32.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self.dtype {
            DType::BF16 => Ok(self.to_vec::<bf16>()?.into_iter().map(|v| v.to_f32()).collect()),
            DType::F32 => self.to_vec(),
            other => Err(Error::Device(format!(
                "{}: {} read as floating point",
                self.name(),
                other.name()
            ))),
        }
    }

    /// Fills a contiguous tensor with zeros.
    pub fn zero(&self) -> Result<()> {
        debug_assert!(self.is_contiguous());
        // SAFETY: the view lies in its block by construction.
        unsafe { self.device().fill(self.address(), 0, self.numel() * self.dtype.size()) }
    }

    /// Copies `src`, which has the same size and dtype. Both are contiguous.
    pub fn copy_from(&self, src: &Tensor) -> Result<()> {
        if self.dtype != src.dtype
            || self.numel() != src.numel()
            || !self.is_contiguous()
            || !src.is_contiguous()
        {
            return Err(Error::Device(format!(
                "copy of {src:?} into {self:?}: they differ in dtype or size"
            )));
        }
        // SAFETY: both views lie in their blocks; distinct tensors of a copy do not overlap.
        unsafe {
            self.device().copy(self.address(), src.address(), self.numel() * self.dtype.size())
        }
    }

    // --- views ---

    /// The same memory with another shape. The last dimension of a strided view must not change.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        let last = *shape.last().unwrap_or(&1);
        if shape.iter().product::<usize>() != self.numel()
            || (!self.is_contiguous() && last != self.cols())
        {
            return Err(Error::op("reshape", format!("{self:?} does not reshape to {shape:?}")));
        }
        let stride = if self.is_contiguous() { last } else { self.stride };
        Ok(Tensor { shape: Dims::of(shape)?, stride, ..self.clone() })
    }

    /// Rows `from..to` of a matrix (or elements of a vector).
    pub fn rows(&self, from: usize, to: usize) -> Result<Tensor> {
        if from > to || to > self.shape[0] || self.shape.len() > 2 {
            return Err(Error::op("rows", format!("rows {from}..{to} of {self:?}")));
        }
        let mut shape = self.shape;
        shape[0] = to - from;
        let step = if self.shape.len() == 1 { 1 } else { self.stride };
        Ok(Tensor {
            offset: self.offset + from * step * self.dtype.size(),
            shape,
            id: Id::Constant,
            ..self.clone()
        })
    }

    /// Columns `from..to` of a matrix: a strided view.
    pub fn columns(&self, from: usize, to: usize) -> Result<Tensor> {
        if from > to || to > self.cols() || self.shape.len() != 2 {
            return Err(Error::op("columns", format!("columns {from}..{to} of {self:?}")));
        }
        let shape = Dims::of(&[self.shape[0], to - from])?;
        Ok(Tensor {
            offset: self.offset + from * self.dtype.size(),
            shape,
            id: Id::Constant,
            ..self.clone()
        })
    }

    /// A view of this memory with another dtype and shape, from `byte_offset` on. Parameters share
    /// one arena this way. Error: the view exceeds the block.
    pub fn view(&self, byte_offset: usize, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        if self.offset + byte_offset + bytes > self.block.bytes() {
            return Err(Error::op(
                "view",
                format!("{shape:?} of {} at byte {byte_offset} of {self:?}", dtype.name()),
            ));
        }
        let stride = *shape.last().unwrap_or(&1);
        Ok(Tensor {
            block: self.block.clone(),
            offset: self.offset + byte_offset,
            dtype,
            shape: Dims::of(shape)?,
            stride,
            id: Id::Constant,
        })
    }

    pub fn with_id(mut self, id: Id) -> Tensor {
        self.id = id;
        self
    }

    pub fn out(&self) -> Out<'_> {
        Out(self)
    }

    // --- properties ---

    pub fn id(&self) -> Id {
        self.id
    }

    pub fn address(&self) -> u64 {
        self.block.address() + self.offset as u64
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The shape as a `Copy` value.
    pub fn dims(&self) -> Dims {
        self.shape
    }

    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The last dimension.
    pub fn cols(&self) -> usize {
        *self.shape.last().unwrap_or(&1)
    }

    /// The product of all dimensions but the last.
    pub fn row_count(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    pub fn is_contiguous(&self) -> bool {
        self.stride == self.cols() || self.row_count() <= 1
    }

    pub fn bytes(&self) -> usize {
        self.numel() * self.dtype.size()
    }

    pub fn name(&self) -> &str {
        self.block.name()
    }

    /// True if no other handle shares the memory.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.block) == 1
    }

    pub fn device(&self) -> &Arc<dyn Device> {
        self.block.device()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {}", self.name(), self.shape, self.dtype.name())
    }
}
