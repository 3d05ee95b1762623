//! Turns a panic of a parsing library into an error. Layer 6.
//!
//! Invariant: the panic message of the guarded call is not printed; panics of all other threads are
//! printed as usual.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

/// Runs `f`; if it panics, returns the panic message as the error. Use only around third-party
/// parsers.
pub fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = take_hook();
        set_hook(Box::new(move |info| {
            if !QUIET.get() {
                previous(info);
            }
        }));
    });
    let outer = QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    QUIET.set(outer);
    result.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("unknown panic").to_string()
    })
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_comes_back_as_its_message() {
        assert_eq!(caught(|| 3), Ok(3));
        let n = 7;
        assert_eq!(caught(|| -> i32 { panic!("bad {n}") }), Err("bad 7".to_string()));
        assert_eq!(
            caught(|| -> i32 { caught(|| -> i32 { panic!("inner") }).unwrap_err().len() as i32 }),
            Ok(5)
        );
    }
}
