//! Named device memory: a caching, best-fit, coalescing allocator over large slabs. Layer 1.
//!
//! Invariant: the same sequence of requests gives the same addresses, so a repeated step can be
//! captured. The pool knows the name of each byte in use, so an out-of-memory error can list the
//! largest blocks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use super::{Device, lock};
use crate::error::{Error, Result};

const GRAIN: usize = 256;

pub struct Pool {
    device: Arc<dyn Device>,
    /// The pool that provides the slabs, and their name in it. None: the device provides them.
    parent: Option<(Arc<Pool>, String)>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Slabs: address to bytes.
    slabs: BTreeMap<u64, usize>,
    /// The blocks of the parent that serve as slabs.
    held: Vec<Arc<Block>>,
    /// Free ranges: address to bytes.
    free: BTreeMap<u64, usize>,
    /// The free ranges as (bytes, address).
    by_size: BTreeSet<(usize, u64)>,
    /// A number for each name ever requested, so that an allocation creates no string.
    numbers: HashMap<Arc<str>, usize>,
    names: Vec<Arc<str>>,
    /// Bytes in use, by number.
    live: Vec<usize>,
    in_use: usize,
    peak: usize,
    /// Bytes in use at the peak, by number.
    at_peak: Vec<usize>,
}

/// Memory from a [`Pool`]; returns to it when the last handle is dropped.
pub struct Block {
    address: u64,
    bytes: usize,
    number: usize,
    name: Arc<str>,
    pool: Arc<Pool>,
}

impl Block {
    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn device(&self) -> &Arc<dyn Device> {
        &self.pool.device
    }
}

impl Pool {
    pub fn new(device: Arc<dyn Device>) -> Arc<Pool> {
        Arc::new(Pool { device, parent: None, state: Mutex::default() })
    }

    /// A pool that takes its memory from `parent`, where it is in use under `name` until this pool
    /// is dropped. So the memory of a recorded graph is never given to others between two replays.
    pub fn within(parent: &Arc<Pool>, name: &str) -> Arc<Pool> {
        let (device, parent) = (parent.device.clone(), Some((parent.clone(), name.to_string())));
        Arc::new(Pool { device, parent, state: Mutex::default() })
    }

    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Allocates `bytes` of device memory under `name`; lists of blocks add up equal names.
    /// Contents undefined. Error: out of memory.
    pub fn alloc(self: &Arc<Pool>, name: &str, bytes: usize) -> Result<Arc<Block>> {
        let size = bytes.max(1).next_multiple_of(GRAIN);
        let mut state = lock(&self.state);
        // In strict mode each block is a separate allocation with its own red zones.
        let address = if self.device.is_strict() {
            self.device.alloc(bytes)?
        } else {
            match state.take(size) {
                Some(address) => address,
                None => {
                    self.grow(&mut state, size, name)?;
                    state
                        .take(size)
                        .ok_or_else(|| Error::Device("pool: a new slab has no room".into()))?
                }
            }
        };
        let number = state.number(name);
        state.live[number] += size;
        state.in_use += size;
        if state.in_use > state.peak {
            let State { peak, in_use, at_peak, live, .. } = &mut *state;
            *peak = *in_use;
            at_peak.clone_from(live);
        }
        let name = state.names[number].clone();
        Ok(Arc::new(Block { address, bytes, number, name, pool: self.clone() }))
    }

    /// Bytes in use now, and at the peak.
    pub fn in_use(&self) -> (usize, usize) {
        let state = lock(&self.state);
        (state.in_use, state.peak)
    }

    /// Bytes that the pool has taken from the device and that are not in use.
    pub fn cached(&self) -> usize {
        let state = lock(&self.state);
        state.free.values().sum()
    }

    /// Names and bytes of the memory in use at the peak, largest first.
    pub fn high_water(&self) -> Vec<(String, usize)> {
        let state = lock(&self.state);
        let mut list = state.list(&state.at_peak);
        list.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        list
    }

    fn grow(&self, state: &mut State, size: usize, name: &str) -> Result<()> {
        if let Some((parent, held_as)) = &self.parent {
            let block = parent.alloc(held_as, size.next_multiple_of(2 << 20))?;
            let (address, bytes) = (block.address(), block.bytes());
            state.held.push(block);
            state.slabs.insert(address, bytes);
            state.release(address, bytes);
            return Ok(());
        }
        // Slabs of at least 32 MiB, a multiple of 2 MiB: few calls to the driver, little waste.
        let slab = size.next_multiple_of(2 << 20).max(32 << 20);
        let (address, slab) = match self.device.alloc(slab) {
            Ok(address) => (address, slab),
            Err(_) => match self.device.alloc(size) {
                Ok(address) => (address, size),
                Err(cause) => {
                    return Err(Error::OutOfMemory(self.out_of_memory(state, size, name, &cause)));
                }
            },
        };
        state.slabs.insert(address, slab);
        state.release(address, slab);
        Ok(())
    }

    fn out_of_memory(&self, state: &State, size: usize, name: &str, cause: &Error) -> String {
        let mut list = state.list(&state.live);
        list.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut text = format!(
            "out of memory: \"{name}\" needs {} more beside {} in use ({cause}). The largest blocks:",
            mebibytes(size),
            mebibytes(state.in_use)
        );
        for (name, bytes) in list.iter().take(10) {
            text += &format!("\n  {:>12}  {name}", mebibytes(*bytes));
        }
        text + "\nTo use less memory, lower per_device_train_batch_size (and raise \
                gradient_accumulation_steps to keep the step's size), lower max_length, or set \
                gradient_checkpointing=true."
    }
}

impl State {
    fn number(&mut self, name: &str) -> usize {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let (number, name): (usize, Arc<str>) = (self.names.len(), name.into());
        self.numbers.insert(name.clone(), number);
        self.names.push(name);
        self.live.push(0);
        number
    }

    /// The nonzero entries of `bytes` with their names.
    fn list(&self, bytes: &[usize]) -> Vec<(String, usize)> {
        let some = self.names.iter().zip(bytes).filter(|(_, bytes)| **bytes > 0);
        some.map(|(name, bytes)| (name.to_string(), *bytes)).collect()
    }

    /// Takes the smallest free range that fits, at the lowest address among equals.
    fn take(&mut self, size: usize) -> Option<u64> {
        let (bytes, address) = *self.by_size.range((size, 0)..).next()?;
        self.remove(address, bytes);
        if bytes > size {
            self.insert(address + size as u64, bytes - size);
        }
        Some(address)
    }

    /// Returns a range and joins it with its free neighbours in the same slab.
    fn release(&mut self, mut address: u64, mut bytes: usize) {
        let slab = self
            .slabs
            .range(..=address)
            .next_back()
            .map(|(a, b)| (*a, a + *b as u64))
            .unwrap_or((address, 0));
        if let Some((&before, &size)) = self.free.range(..address).next_back()
            && before + size as u64 == address
            && before >= slab.0
        {
            self.remove(before, size);
            (address, bytes) = (before, bytes + size);
        }
        let end = address + bytes as u64;
        if end < slab.1
            && let Some(&size) = self.free.get(&end)
        {
            self.remove(end, size);
            bytes += size;
        }
        self.insert(address, bytes);
    }

    fn insert(&mut self, address: u64, bytes: usize) {
        self.free.insert(address, bytes);
        self.by_size.insert((bytes, address));
    }

    fn remove(&mut self, address: u64, bytes: usize) {
        self.free.remove(&address);
        self.by_size.remove(&(bytes, address));
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let size = self.bytes.max(1).next_multiple_of(GRAIN);
        let mut state = lock(&self.pool.state);
        state.in_use -= size;
        state.live[self.number] -= size;
        if self.pool.device.is_strict() {
            // SAFETY: this was the last handle of an allocation that `alloc` made with the same
            // size.
            unsafe { self.pool.device.free(self.address, self.bytes) };
        } else {
            state.release(self.address, size);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.parent.is_some() {
            return; // the slabs are blocks of the parent and return to it
        }
        let slabs = std::mem::take(&mut lock(&self.state).slabs);
        for (address, bytes) in slabs {
            // SAFETY: each Block holds the pool, so no block is left.
            unsafe { self.device.free(address, bytes) };
        }
    }
}

/// A size as the project prints it: "12.3 MiB".
pub fn mebibytes(bytes: usize) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib >= 1024.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    #[test]
    fn freed_neighbours_join_and_addresses_repeat() {
        let pool = Pool::new(Arc::new(Cpu::new()));
        let round = || {
            let a = pool.alloc("a", 1000).unwrap();
            let b = pool.alloc("b", 5000).unwrap();
            let c = pool.alloc("c", 70).unwrap();
            (a.address(), b.address(), c.address())
        };
        assert_eq!(round(), round());
        let state = lock(&pool.state);
        assert_eq!(state.free.len(), 1, "all ranges joined again");
        assert_eq!(state.in_use, 0);
    }

    /// The sets choose the same range as a search through all of them.
    #[test]
    fn the_smallest_range_that_fits_is_taken_lowest_address_first() {
        let pool = Pool::new(Arc::new(Cpu::new()));
        let mut held: Vec<Option<Arc<Block>>> = vec![None; 64];
        let mut x = 1u32;
        for _ in 0..4000 {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (slot, size) = ((x >> 8) as usize % 64, (x >> 16) as usize * 20 + 1);
            held[slot] = None;
            let wanted = {
                let state = lock(&pool.state);
                let size = size.next_multiple_of(GRAIN);
                let fits = state.free.iter().filter(|(_, bytes)| **bytes >= size);
                assert_eq!(state.free.len(), state.by_size.len());
                fits.min_by_key(|(address, bytes)| (**bytes, **address)).map(|(a, _)| *a)
            };
            let block = pool.alloc(["a", "b", "c"][slot % 3], size).unwrap();
            assert!(wanted.is_none_or(|address| address == block.address()));
            held[slot] = Some(block);
        }
        held.clear();
        assert_eq!(pool.in_use().0, 0);
        let state = lock(&pool.state);
        assert!(state.live.iter().all(|bytes| *bytes == 0));
    }

    #[test]
    fn a_pool_within_a_pool_holds_its_memory_until_it_goes() {
        let pool = Pool::new(Arc::new(Cpu::new()));
        let inner = Pool::within(&pool, "recorded steps");
        let address = inner.alloc("a", 1000).unwrap().address();
        assert_eq!(pool.high_water(), [("recorded steps".to_string(), 2 << 20)]);
        let outside = pool.alloc("b", 1 << 20).unwrap();
        assert!(!(address..address + (2 << 20)).contains(&outside.address()));
        assert_eq!(inner.alloc("c", 1 << 20).unwrap().address(), address, "it repeats");
        drop((inner, outside));
        assert_eq!(pool.in_use().0, 0);
    }

    #[test]
    fn the_high_water_list_names_what_was_in_use_at_the_peak() {
        let pool = Pool::new(Arc::new(Cpu::new()));
        let _a = pool.alloc("weights", 10_000).unwrap();
        {
            let _b = pool.alloc("logits", 1 << 20).unwrap();
        }
        let _c = pool.alloc("small", 10).unwrap();
        assert_eq!(pool.high_water()[0], ("logits".to_string(), 1 << 20));
        assert!(pool.in_use().1 > pool.in_use().0);
    }
}
