//! Connections, routes, limits and shutdown. Layer 9.
//!
//! Invariant: every request, whatever it contains, is answered with a status and a JSON error or
//! result, and the next connection is served.

use std::future::{Future, poll_fn};
use std::net::TcpListener;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::body::{Body as _, Bytes};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout, timeout_at};

use super::answer::Answer;
use super::auth;
use super::body::EventStream;
use super::error::{ApiError, json_response, too_slow};
use super::events::{Job, RunJob};
use super::format::{Head, WholeChoice};
use super::names::Served;
use super::request::Asked;
use super::ticket::{ActiveRequest, App};
use crate::error::{Error, Result};
use crate::signals::Stop;

/// Most connections that are open at once; further ones wait to be accepted.
const CONNECTIONS: usize = 4096;
/// Timeout for the head of a request, including the next request on a kept connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Binds the address. Error: it is in use, or does not belong to this machine.
pub fn bind(host: &str, port: usize) -> Result<TcpListener> {
    TcpListener::bind((host, port as u16)).map_err(|e| {
        Error::Run(format!(
            "cannot listen on {host}:{port}: {e}; take another --port (0: a free one) or --host"
        ))
    })
}

/// Serves on this thread until `stop` is requested and all requests have ended or timed out.
pub(super) fn run(listener: TcpListener, app: Arc<App>, stop: Stop) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("the server's socket", e);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("serve")
        .enable_all()
        .build()
        .map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let done = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        accept(listener, app, stop).await;
        Ok(())
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

async fn accept(listener: tokio::net::TcpListener, app: Arc<App>, stop: Stop) {
    let service = TowerToHyperService::new(router(app.clone()));
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let (close, closing) = watch::channel(false);
    let mut deadline = None;
    loop {
        if stop.requested() {
            app.draining.store(true, SeqCst);
            let most = Duration::from_secs(app.config.drain_timeout as u64);
            let end = *deadline.get_or_insert_with(|| Instant::now() + most);
            if app.active.load(SeqCst) == 0 || Instant::now() >= end {
                break;
            }
        }
        let Ok(Ok(permit)) = timeout(POLL, room.clone().acquire_owned()).await else { continue };
        match timeout(POLL, listener.accept()).await {
            Ok(Ok((stream, _))) => {
                let _ = stream.set_nodelay(true);
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service.clone());
                let (mut closing, app) = (closing.clone(), app.clone());
                tokio::spawn(async move {
                    app.metrics.connections.fetch_add(1, Relaxed);
                    let mut connection = pin!(connection);
                    let mut closes = pin!(closing.wait_for(|closes| *closes));
                    let mut told = false;
                    // An error belongs to the client: it disconnected, or does not speak HTTP.
                    poll_fn(|cx| {
                        if !told && closes.as_mut().poll(cx).is_ready() {
                            told = true;
                            connection.as_mut().graceful_shutdown();
                        }
                        connection.as_mut().poll(cx).map(drop)
                    })
                    .await;
                    app.metrics.connections.fetch_sub(1, Relaxed);
                    drop(permit);
                });
            }
            Ok(Err(_)) => sleep(POLL).await, // out of file descriptors
            Err(_) => {}
        }
    }
    drop(listener);
    // Lets answers go out and ends idle connections.
    let _ = close.send(true);
    let end = Instant::now() + Duration::from_secs(1);
    while app.metrics.connections.load(Relaxed) > 0 && Instant::now() < end {
        sleep(Duration::from_millis(5)).await;
    }
}

fn router(app: Arc<App>) -> Router {
    let completions = |State(app): State<Arc<App>>, request| post_request(app, false, request);
    let chat = |State(app): State<Arc<App>>, request| post_request(app, true, request);
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route(COMPLETIONS, post(completions))
        .route(CHAT, post(chat))
        .fallback(|request: Request<Body>| async move {
            let message = format!(
                "there is nothing at {}; use {COMPLETIONS}, {CHAT}, /v1/models, /health or \
                 /metrics",
                request.uri().path()
            );
            ApiError::new(StatusCode::NOT_FOUND, message)
        })
        .method_not_allowed_fallback(|request: Request<Body>| async move {
            let message = format!("{} does not support {}", request.uri().path(), request.method());
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
        })
        .with_state(app)
}

async fn health(State(app): State<Arc<App>>) -> Response {
    match app.draining.load(SeqCst) {
        true => draining().into_response(),
        false => json_response(StatusCode::OK, &json!({ "status": "ok" })),
    }
}

async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if let Err(e) = auth::check(app.config.api_key.as_deref(), &headers) {
        return e.into_response();
    }
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, app.metrics.text(app.active.load(SeqCst))).into_response()
}

fn model_json(app: &App, served: &Served) -> Value {
    json!({
        "id": served.name, "object": "model", "created": app.started, "owned_by": "temper",
        "max_model_len": served.longest,
    })
}

async fn models(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if let Err(e) = auth::check(app.config.api_key.as_deref(), &headers) {
        return e.into_response();
    }
    let data: Vec<Value> = app.models.iter().map(|served| model_json(&app, served)).collect();
    json_response(StatusCode::OK, &json!({ "object": "list", "data": data }))
}

async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    if let Err(e) = auth::check(app.config.api_key.as_deref(), &headers) {
        return e.into_response();
    }
    match app.models.iter().find(|served| served.is(&name)) {
        Some(served) => json_response(StatusCode::OK, &model_json(&app, served)),
        None => ApiError::new(StatusCode::NOT_FOUND, format!("no model {name:?} on this server"))
            .code("model_not_found")
            .into_response(),
    }
}

async fn post_request(app: Arc<App>, chat: bool, request: Request<Body>) -> Response {
    let response = match answer(&app, chat, request).await {
        Ok(response) => response,
        Err(e) => e.into_response(),
    };
    let path = if chat { CHAT } else { COMPLETIONS };
    app.metrics.answered(path, response.status().as_u16());
    response
}

async fn answer(app: &Arc<App>, chat: bool, request: Request<Body>) -> Result<Response, ApiError> {
    let began = Instant::now();
    auth::check(app.config.api_key.as_deref(), request.headers())?;
    let active = ActiveRequest::new(app);
    if app.draining.load(SeqCst) {
        return Err(draining());
    }
    let deadline = (began + Duration::from_secs(app.config.request_timeout as u64)).into();
    let late = |_| too_slow(&app.config);
    is_json(request.headers())?;
    let most = app.config.max_request_bytes;
    let body = timeout_at(deadline, read(request.into_body(), most)).await.map_err(late)??;
    // Rendering and tokenizing would block a thread that other requests wait for.
    let parsing = {
        let app = app.clone();
        move || Asked::parse(&app.models, &app.config, chat, &body)
    };
    let asked = tokio::task::spawn_blocking(parsing).await.map_err(ApiError::internal)??;
    let ticket = app.ticket(asked.choices(), began)?;
    let mut answer = Answer::new(asked, ticket);
    let (send, mut events) = tokio::sync::mpsc::unbounded_channel();
    if answer.needs_worker() {
        let asked = &answer.asked;
        app.send(Job::Run(Box::new(RunJob {
            id: answer.ticket.id,
            model: asked.model,
            prompts: asked.prompts.iter().map(|p| p.ids.clone()).collect(),
            n: asked.n,
            options: asked.options.clone(),
            seeded: asked.seeded,
            score: asked.score(),
            each_token: asked.each_token(),
            events: send,
        })))?;
    }
    if answer.asked.stream {
        let stream = EventStream::new(answer, events, tokio::time::sleep_until(deadline), active)?;
        let kind =
            [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
        return Ok((kind, Body::new(stream)).into_response());
    }
    let mut choices: Vec<WholeChoice> = Vec::new();
    choices.resize_with(answer.asked.choices(), WholeChoice::default);
    let mut deltas = answer.begin()?;
    loop {
        deltas.drain(..).for_each(|delta| choices[delta.choice].add(delta));
        if answer.is_done() {
            break;
        }
        let event = timeout_at(deadline, events.recv()).await.map_err(late)?;
        let event = event.ok_or_else(|| ApiError::internal("the server is stopping"))?;
        deltas = answer.on(event)?;
    }
    let whole = Head::of(&answer).whole(&answer, choices);
    Ok(json_response(StatusCode::OK, &whole))
}

fn draining() -> ApiError {
    let message = "the server is stopping; send the request to another one, or again later";
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).code("stopping")
}

/// Protects against other sites: a page can send a form to this server, but not JSON without a CORS
/// preflight.
fn is_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    match kind.is_some_and(|kind| kind.trim_start().starts_with("application/json")) {
        true => Ok(()),
        false => {
            let message = "send JSON with the header `Content-Type: application/json`";
            Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
        }
    }
}

async fn read(mut body: Body, most: usize) -> Result<Bytes, ApiError> {
    let mut all = Vec::new();
    if body.size_hint().lower() > most as u64 {
        return Err(too_large(most));
    }
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let cut =
            |e| ApiError::new(StatusCode::BAD_REQUEST, format!("the body is incomplete: {e}"));
        if let Ok(data) = frame.map_err(cut)?.into_data() {
            if all.len() + data.len() > most {
                return Err(too_large(most));
            }
            all.extend_from_slice(&data);
        }
    }
    Ok(all.into())
}

fn too_large(most: usize) -> ApiError {
    let message = format!(
        "the body is larger than {most} bytes; send less, or start the server with a higher \
         max_request_bytes"
    );
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}
