//! `temper serve`: OpenAI's completions and chat over HTTP, on the rollout engine. Layer 9.
//!
//! Invariant: one thread owns the device and computes; the others only read, render and write. An
//! answer depends only on the request and the model, never on other requests.

mod answer;
mod auth;
mod body;
mod error;
mod events;
mod fields;
mod format;
mod http;
mod metrics;
mod model;
mod names;
mod request;
mod score;
mod text;
mod ticket;
mod tools;
mod worker;

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};

use crate::autograd::Cx;
use crate::config::ServeConfig;
use crate::error::{Error, Result};
use crate::signals::Stop;

pub use self::http::bind;
pub use self::model::{AdapterSpec, ServedModels};

use self::ticket::App;
use self::worker::Worker;

/// Serves until `stop` is requested and all requests have ended. Calls `ready` with the address as
/// soon as requests are answered. The calling thread computes.
pub fn serve(
    cx: Cx,
    models: ServedModels,
    listener: std::net::TcpListener,
    config: ServeConfig,
    stop: Stop,
    ready: impl FnOnce(SocketAddr) -> Result<()>,
) -> Result<()> {
    let address = listener.local_addr().map_err(|e| Error::io("the server's socket", e))?;
    let (jobs, queue) = mpsc::channel();
    let ServedModels { names, decoders } = models;
    let app = Arc::new(App::new(names, config, jobs));
    let mut worker = Worker::new(cx, decoders, &app, queue)?;
    ready(address)?;
    let io = std::thread::Builder::new()
        .name("serve".into())
        .spawn(move || http::run(listener, app, stop))
        .map_err(|e| Error::Run(format!("cannot start the server's thread: {e}")))?;
    worker.run();
    io.join().map_err(|_| Error::Run("the server's thread panicked".into()))?
}
