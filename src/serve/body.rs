//! A stream of server-sent events. Layer 9.
//!
//! Invariant: a body that is dropped before its end, for example because the client has
//! disconnected, cancels its request.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame};
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Sleep;

use super::answer::{Answer, Delta};
use super::error::{ApiError, too_slow};
use super::events::Event;
use super::format::Head;
use super::ticket::ActiveRequest;

pub(super) struct EventStream {
    answer: Answer,
    head: Head,
    events: UnboundedReceiver<Event>,
    deadline: Pin<Box<Sleep>>,
    /// Text that is ready to be sent.
    ready: String,
    ended: bool,
    _active: ActiveRequest,
}

impl EventStream {
    pub fn new(
        mut answer: Answer,
        events: UnboundedReceiver<Event>,
        deadline: Sleep,
        active: ActiveRequest,
    ) -> Result<EventStream, ApiError> {
        let head = Head::of(&answer);
        let first = answer.begin()?;
        let mut ready = String::new();
        let roles = (0..answer.asked.choices()).filter_map(|choice| head.role(choice));
        roles.for_each(|role| write_event(&mut ready, &role));
        let mut stream = EventStream {
            answer,
            head,
            events,
            deadline: Box::pin(deadline),
            ready,
            ended: false,
            _active: active,
        };
        stream.add(&first);
        Ok(stream)
    }

    fn add(&mut self, deltas: &[Delta]) {
        let chunks = deltas.iter().filter_map(|delta| self.head.chunk(delta));
        chunks.for_each(|chunk| write_event(&mut self.ready, &chunk));
        if self.answer.is_done() {
            if self.answer.asked.stream_usage {
                write_event(&mut self.ready, &self.head.usage_chunk(&self.answer));
            }
            self.end();
        }
    }

    fn fail(&mut self, error: &ApiError) {
        write_event(&mut self.ready, &error.json());
        self.end();
    }

    fn end(&mut self) {
        if !self.ended {
            self.ready += "data: [DONE]\n\n";
            self.ended = true;
        }
    }
}

fn write_event(out: &mut String, value: &Value) {
    *out += &format!("data: {value}\n\n");
}

impl Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let own = self.get_mut();
        while !own.ended {
            match own.events.poll_recv(cx) {
                Poll::Ready(Some(event)) => match own.answer.on(event) {
                    Ok(deltas) => own.add(&deltas),
                    Err(e) => own.fail(&e),
                },
                Poll::Ready(None) => own.fail(&ApiError::internal("the server is stopping")),
                Poll::Pending if own.deadline.as_mut().poll(cx).is_ready() => {
                    own.fail(&too_slow(&own.answer.ticket.app.config));
                }
                Poll::Pending => break,
            }
        }
        match (own.ready.is_empty(), own.ended) {
            (false, _) => {
                let text = std::mem::take(&mut own.ready);
                Poll::Ready(Some(Ok(Frame::data(Bytes::from(text)))))
            }
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }
}
