//! `temper serve`: the binary on a free port, and clients with hand-written HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{MODEL, command, done, fixture, json_lines};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start(more: &[&str]) -> Server {
        Server::of(&[&["serve", MODEL, "--device", "cpu", "--port", "0"][..], more].concat())
    }

    fn of(args: &[&str]) -> Server {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        let address = first.strip_prefix("listening on http://").unwrap();
        let address = address.strip_suffix("/v1").unwrap().parse().unwrap();
        assert!(lines.next().unwrap().unwrap().starts_with("try: curl http://"));
        Server { child, address }
    }

    fn open(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        stream
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.open();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server that has refused the head may not read the body.
        let _ = stream.write_all(body);
        stream
    }

    fn get(&self, path: &str) -> Answer {
        read(self.send("GET", path, "", b""))
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        read(self.posted(path, body))
    }

    fn posted(&self, path: &str, body: &Value) -> TcpStream {
        let headers = "content-type: application/json\r\n";
        self.send("POST", path, headers, body.to_string().as_bytes())
    }

    /// The only choice's text of a request that must succeed.
    fn text(&self, body: &Value) -> String {
        let answer = self.post(COMPLETIONS, body).ok();
        answer["choices"][0]["text"].as_str().unwrap().to_string()
    }

    fn metric(&self, name: &str) -> u64 {
        let text = String::from_utf8(self.get("/metrics").body).unwrap();
        let line = text
            .lines()
            .find(|l| l.split(' ').next() == Some(name))
            .unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Waits until nothing is served any more.
    fn settle(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        let busy = || {
            self.metric("temper_sequences_running")
                + self.metric("temper_sequences_waiting")
                + self.metric("temper_requests_active")
        };
        while busy() > 0 {
            assert!(Instant::now() < end, "{} sequences or requests are left", busy());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The chunks of a stream, without its end.
    fn events(&self) -> Vec<Value> {
        let text = std::str::from_utf8(&self.body).unwrap();
        let mut events: Vec<&str> =
            text.split_terminator("\n\n").map(|e| e.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|e| serde_json::from_str(e).unwrap()).collect()
    }
}

fn read(mut stream: TcpStream) -> Answer {
    let mut all = Vec::new();
    // The end of a connection that was refused early may be a reset.
    let _ = stream.read_to_end(&mut all);
    let end = all
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .unwrap_or_else(|| panic!("no head in {:?}", String::from_utf8_lossy(&all)));
    let head = String::from_utf8(all[..end].to_vec()).unwrap().to_lowercase();
    let mut body = all[end + 4..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        let (mut rest, mut whole) = (&body[..], Vec::new());
        loop {
            let line = rest.windows(2).position(|w| w == b"\r\n").unwrap();
            let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16);
            let (size, data) = (size.unwrap(), &rest[line + 2..]);
            if size == 0 {
                break;
            }
            whole.extend(&data[..size]);
            rest = &data[size + 2..];
        }
        body = whole;
    }
    Answer { status: head[9..12].parse().unwrap(), head, body }
}

/// The texts of `temper generate`, prompt by prompt, member by member.
fn generated(prompts: &[Value], more: &[&str]) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (dir.path().join("p.jsonl"), dir.path().join("c.jsonl"));
    let row = |p: &Value| json!({ "prompt": p }).to_string() + "\n";
    std::fs::write(&data, prompts.iter().map(row).collect::<String>()).unwrap();
    let (data, out) = (data.to_str().unwrap(), out.to_str().unwrap());
    let args = ["generate", "--model", MODEL, "--device", "cpu", "--data", data, "--output", out];
    done(&[&args[..], more].concat());
    json_lines(out)
}

/// A request whose completions do not end early: what was said is said again.
fn endless(prompt: Value, n: usize, max_tokens: usize) -> Value {
    json!({
        "prompt": prompt, "n": n, "max_tokens": max_tokens, "temperature": 0,
        "repetition_penalty": 0.2,
    })
}

fn prompts(n: usize) -> Vec<Value> {
    let words = ["one", "two", "three", "count", "the", "answer", "is", "not"];
    let word = |i: usize| words[i % words.len()];
    (0..n).map(|i| json!(format!("{} {} {i}", word(i), word(i / 3)))).collect()
}

#[test]
fn clients_at_once_get_the_greedy_answers_of_generate() {
    let prompts = prompts(64);
    let want = generated(&prompts, &["temperature=0", "max_new_tokens=40"]);
    let server = Server::start(&["max_sequences=24", "step_tokens=64"]);
    std::thread::scope(|scope| {
        for (i, (prompt, want)) in prompts.iter().zip(&want).enumerate() {
            let server = &server;
            scope.spawn(move || {
                let mut body = json!({ "prompt": prompt, "temperature": 0, "max_tokens": 40 });
                if i % 5 == 0 {
                    // Others sample meanwhile.
                    let other =
                        json!({ "prompt": prompt, "temperature": 0.9, "max_tokens": 20, "n": 3 });
                    assert_eq!(
                        server.post(COMPLETIONS, &other).ok()["choices"].as_array().unwrap().len(),
                        3
                    );
                }
                if i % 3 == 0 {
                    body["logprobs"] = json!(2);
                }
                let answer = server.post(COMPLETIONS, &body).ok();
                let choice = &answer["choices"][0];
                assert_eq!(choice["text"], want["completion"], "{prompt}");
                assert_eq!(choice["finish_reason"], want["finish_reason"]);
                let tokens = want["completion_ids"].as_array().unwrap().len();
                assert_eq!(answer["usage"]["completion_tokens"], json!(tokens));
                if i % 3 == 0 {
                    assert_eq!(choice["logprobs"]["token_logprobs"], want["logps"]);
                }
            });
        }
    });
    server.settle();
    assert_eq!(
        server.metric("temper_requests_total{path=\"/v1/completions\",status=\"200\"}"),
        64 + 13
    );
}

#[test]
fn a_chat_is_rendered_as_generate_renders_it() {
    let messages = json!([{ "role": "user", "content": "one two three" }]);
    let want = generated(std::slice::from_ref(&messages), &["temperature=0", "max_new_tokens=30"]);
    let server = Server::start(&[]);
    let mut body = json!({ "messages": messages, "temperature": 0, "max_tokens": 30 });
    let answer = server.post(CHAT, &body).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], want[0]["completion"]);
    assert_eq!(answer["object"], "chat.completion");
    // The same in parts, and as a stream.
    body["messages"][0]["content"] = json!([{ "type": "text", "text": "one two three" }]);
    body["stream"] = json!(true);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    let events = server.post(CHAT, &body).events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String =
        events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(json!(text), want[0]["completion"]);
    let tokens: Vec<&Value> = events
        .iter()
        .filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .collect();
    assert_eq!(
        tokens.iter().map(|t| &t["logprob"]).collect::<Vec<_>>(),
        want[0]["logps"].as_array().unwrap().iter().collect::<Vec<_>>()
    );
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!(top[0]["logprob"], token["logprob"], "greedy takes the most probable one");
        assert!(top[1]["logprob"].as_f64() <= top[0]["logprob"].as_f64());
    }
}

#[test]
fn a_stream_says_what_a_whole_answer_says() {
    let server = Server::start(&[]);
    let mut body = json!({
        "prompt": ["one two", "the answer is"], "n": 2, "temperature": 1, "seed": 11,
        "max_tokens": 50, "logprobs": 3, "echo": true,
    });
    let whole = server.post(COMPLETIONS, &body).ok();
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let mut events = server.post(COMPLETIONS, &body).events();
    let usage = events.pop().unwrap();
    assert_eq!((&usage["usage"], &usage["choices"]), (&whole["usage"], &json!([])));
    assert!(events.len() > 20, "pieces come one by one");
    for (i, want) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let own = || events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == json!(i));
        let text: String = own().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(json!(text), want["text"]);
        for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let all: Vec<Value> =
                own().filter_map(|c| c["logprobs"][field].as_array()).flatten().cloned().collect();
            assert_eq!(json!(all), want["logprobs"][field], "{field}");
        }
        assert_eq!(own().next_back().unwrap()["finish_reason"], want["finish_reason"]);
    }
}

#[test]
fn a_seed_gives_the_tokens_of_generate_whatever_the_load() {
    let prompts = [json!("one two"), json!("the answer")];
    let keys = ["temperature=0.8", "top_p=0.9", "top_k=50", "seed=7", "n=3", "max_new_tokens=30"];
    let want = generated(&prompts, &keys);
    let server = Server::start(&[]);
    let body = json!({
        "prompt": prompts, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 7, "n": 3,
        "max_tokens": 30,
    });
    let check = || {
        let answer = server.post(COMPLETIONS, &body).ok();
        for (choice, want) in answer["choices"].as_array().unwrap().iter().zip(&want) {
            assert_eq!(choice["text"], want["completion"]);
        }
    };
    check();
    let noise = json!({ "prompt": "two", "n": 8, "max_tokens": 60, "repetition_penalty": 1.3 });
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| server.post(COMPLETIONS, &noise).ok());
            scope.spawn(check);
        }
    });
    let free = json!({ "prompt": "one two", "n": 2, "max_tokens": 40 });
    let answer = server.post(COMPLETIONS, &free).ok();
    assert_ne!(answer["choices"][0]["text"], answer["choices"][1]["text"]);
}

#[test]
fn echoed_log_probs_are_those_of_score() {
    let ids: Vec<Vec<u32>> = vec![vec![5, 6, 7, 8, 9, 40, 41], (30..230).collect(), vec![100, 99]];
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("rows.jsonl");
    let row = |ids: &Vec<u32>| json!({ "input_ids": ids }).to_string() + "\n";
    std::fs::write(&data, ids.iter().map(row).collect::<String>()).unwrap();
    let out =
        done(&["score", "--model", MODEL, "--device", "cpu", "--data", data.to_str().unwrap()]);
    let want: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let server = Server::start(&["step_tokens=100"]);
    // As lm-eval asks: one token more, greedy, and the most probable one at each place.
    for (max_tokens, logprobs) in [(0, 0), (1, 1), (3, 5)] {
        let body = json!({
            "prompt": ids, "max_tokens": max_tokens, "logprobs": logprobs, "echo": true,
            "temperature": 0,
        });
        let answer = server.post(COMPLETIONS, &body).ok();
        for ((choice, want), ids) in
            answer["choices"].as_array().unwrap().iter().zip(&want).zip(&ids)
        {
            let all = choice["logprobs"]["token_logprobs"].as_array().unwrap();
            assert!(all.len() <= ids.len() + max_tokens && all.len() >= ids.len());
            assert_eq!(all[0], Value::Null);
            assert_eq!(json!(all[1..ids.len()]), want["logps"]);
            let top = choice["logprobs"]["top_logprobs"].as_array().unwrap();
            for (top, own) in top.iter().zip(all).skip(1).filter(|_| logprobs > 0) {
                let top: Vec<f64> =
                    top.as_object().unwrap().values().map(|v| v.as_f64().unwrap()).collect();
                assert!((1..=logprobs + 1).contains(&top.len()));
                let best = top.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert!(best >= own.as_f64().unwrap());
            }
            for (own, top) in
                all[ids.len()..].iter().zip(&top[ids.len()..]).filter(|_| logprobs > 0)
            {
                let best = top
                    .as_object()
                    .unwrap()
                    .values()
                    .map(|v| v.as_f64().unwrap())
                    .fold(f64::NEG_INFINITY, f64::max);
                assert_eq!(own.as_f64(), Some(best), "greedy takes the most probable one");
            }
        }
    }
    let echo = json!({ "prompt": "one two", "max_tokens": 0, "echo": true });
    assert_eq!(server.text(&echo), "one two");
}

#[test]
fn a_stop_text_ends_an_answer_before_it() {
    let server = Server::start(&[]);
    // A text that is long enough, and places in it that begin inside one token and end in another.
    let places = |free: &str| -> Vec<usize> {
        let chars: Vec<char> = free.chars().collect();
        let plain = |from: &usize| chars[*from..from + 4].iter().all(char::is_ascii);
        (4..chars.len().saturating_sub(4)).filter(plain).step_by(9).take(3).collect()
    };
    let request = |seed: u32| json!({ "prompt": "one two", "seed": seed, "max_tokens": 60 });
    let (mut body, free) = (0..30)
        .map(|seed| (request(seed), server.text(&request(seed))))
        .find(|(_, free)| places(free).len() == 3)
        .expect("a long text");
    let (chars, starts): (Vec<char>, _) = (free.chars().collect(), places(&free));
    for from in starts {
        let stop: String = chars[from..from + 4].iter().collect();
        let want = &free[..free.find(&stop).unwrap()];
        body["stop"] = json!([format!("{stop}\u{1F600}"), stop]);
        body["stream"] = json!(false);
        let answer = server.post(COMPLETIONS, &body).ok();
        assert_eq!(answer["choices"][0]["text"], json!(want), "{stop:?}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        body["stream"] = json!(true);
        let events = server.post(COMPLETIONS, &body).events();
        let text: String =
            events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(text, want);
    }
}

#[test]
fn a_client_that_leaves_frees_its_sequences() {
    let server = Server::start(&["max_model_len=4000", "cache_tokens=16000"]);
    // The first token has come, so the sequences run; then everybody leaves.
    let mut body = endless(json!(prompts(2)), 4, 3900);
    let mut whole = body.clone();
    body["stream"] = json!(true);
    whole["seed"] = json!(1);
    let streams: Vec<TcpStream> = (0..3)
        .flat_map(|_| [server.posted(COMPLETIONS, &body), server.posted(COMPLETIONS, &whole)])
        .collect();
    for stream in streams.iter().step_by(2) {
        let mut some = [0; 200];
        let mut stream = stream;
        assert!(stream.read(&mut some).unwrap() > 0);
    }
    assert!(server.metric("temper_requests_active") > 0);
    drop(streams);
    server.settle();
    assert!(server.metric("temper_requests_cancelled_total") >= 1);
    let sampled = server.metric("temper_completion_tokens_total");
    assert!(sampled < 6 * 8 * 3900 / 2, "{sampled} tokens for nobody");
    assert_eq!(server.text(&json!({ "prompt": "one", "max_tokens": 0, "echo": true })), "one");
}

#[test]
fn a_bad_request_is_refused_by_the_name_of_its_field() {
    let server = Server::start(&["max_request_bytes=5000", "max_new_tokens=100", "max_queue=10"]);
    let post = |path: &str, body: &str| {
        read(server.send("POST", path, "content-type: application/json\r\n", body.as_bytes()))
    };
    let refused = |path: &str, body: &str, status: u16, param: &str, says: &str| {
        let answer = post(path, body);
        let error = answer.json()["error"].clone();
        assert_eq!(answer.status, status, "{body}: {error}");
        let named = error["param"].as_str().unwrap_or_default();
        let message = error["message"].as_str().unwrap();
        assert!(named == param && message.contains(says), "{body}: {error}");
    };
    for body in
        ["", "{", "nonsense", "[]", "3", "{\"prompt\": \"\\ud800\"}", "{\"prompt\": \"one\""]
    {
        refused(COMPLETIONS, body, 400, "", "");
    }
    let deep = "[".repeat(2000);
    refused(COMPLETIONS, &deep, 400, "", "not JSON");
    for (fields, param, says) in [
        ("\"max_tokens\": 3", "prompt", "missing"),
        ("\"prompt\": \"one\", \"temprature\": 1", "temprature", "did you mean `temperature`"),
        ("\"prompt\": \"one\", \"guided_json\": {}", "guided_json", "leave it out"),
        ("\"prompt\": \"one\", \"logit_bias\": {\"5\": 1}", "logit_bias", "not supported"),
        ("\"prompt\": \"one\", \"presence_penalty\": 0.5", "presence_penalty", "send 0"),
        ("\"prompt\": \"one\", \"best_of\": 3", "best_of", "not supported"),
        ("\"prompt\": \"one\", \"suffix\": \"x\"", "suffix", "not supported"),
        ("\"prompt\": \"one\", \"n\": 0", "n", "from 1 to"),
        ("\"prompt\": \"one\", \"n\": 1.5", "n", "whole number"),
        ("\"prompt\": \"one\", \"n\": 100", "prompt", "max_queue"),
        ("\"prompt\": \"one\", \"max_tokens\": 0", "max_tokens", "from 1"),
        ("\"prompt\": \"one\", \"max_tokens\": 101", "max_tokens", "at most 100"),
        ("\"prompt\": \"one\", \"max_tokens\": 5000", "prompt", "max_model_len"),
        ("\"prompt\": \"one\", \"top_p\": 0", "top_p", "above 0"),
        ("\"prompt\": \"one\", \"temperature\": -1", "temperature", "from 0"),
        ("\"prompt\": \"one\", \"temperature\": \"hot\"", "temperature", "from 0"),
        ("\"prompt\": \"one\", \"temperature\": 1e999", "", "not JSON"),
        ("\"prompt\": \"one\", \"seed\": 1.5", "seed", "integer"),
        ("\"prompt\": \"one\", \"stream\": \"yes\"", "stream", "true or false"),
        ("\"prompt\": \"one\", \"stop\": [3]", "stop", "list of strings"),
        ("\"prompt\": \"one\", \"logprobs\": 21", "logprobs", "to 20"),
        ("\"prompt\": []", "prompt", "empty"),
        ("\"prompt\": \"\"", "prompt", "no tokens"),
        ("\"prompt\": [1, 99999]", "prompt", "token ids from 0 to 319"),
        ("\"prompt\": [1, -1]", "prompt", "token ids"),
        ("\"prompt\": [\"one\", 5]", "prompt", "must be"),
        ("\"prompt\": {\"a\": 1}", "prompt", "must be"),
    ] {
        refused(COMPLETIONS, &format!("{{{fields}}}"), 400, param, says);
    }
    refused(
        COMPLETIONS,
        "{\"prompt\": \"one\", \"model\": \"gpt-5\"}",
        404,
        "model",
        "it has model",
    );
    for (fields, param, says) in [
        ("\"max_tokens\": 3", "messages", "missing"),
        ("\"messages\": []", "messages", "empty"),
        ("\"messages\": [{\"content\": \"x\"}]", "messages", "role"),
        ("\"messages\": \"hello\"", "messages", "a list"),
        (
            "\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]",
            "messages",
            "image_url",
        ),
        (
            "\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"top_logprobs\": 2",
            "top_logprobs",
            "logprobs",
        ),
        (
            "\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"tool_choice\": \"required\"",
            "tool_choice",
            "forced",
        ),
        (
            "\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"response_format\": {\"type\": \"json_object\"}",
            "response_format",
            "not supported",
        ),
    ] {
        refused(CHAT, &format!("{{{fields}}}"), 400, param, says);
    }
    let long = format!("{{\"prompt\": \"{}\"}}", "a".repeat(6000));
    refused(COMPLETIONS, &long, 413, "", "max_request_bytes");
    let plain = read(server.send("POST", COMPLETIONS, "", b"{}"));
    assert_eq!(plain.status, 415);
    assert_eq!(server.get(COMPLETIONS).status, 405);
    let elsewhere = server.get("/v2/anything");
    assert!(
        elsewhere.status == 404
            && elsewhere.json()["error"]["message"].as_str().unwrap().contains(CHAT)
    );
    // Nulls are absent; what changes nothing is not refused.
    let body = json!({
        "prompt": "one two", "max_tokens": 2, "user": "me", "logit_bias": {}, "stop": null, "suffix": null,
        "best_of": 1, "presence_penalty": 0, "model": "model",
    });
    assert_eq!(server.post(COMPLETIONS, &body).status, 200);
}

#[test]
fn cut_and_senseless_connections_do_no_harm() {
    let server = Server::start(&["max_request_bytes=100000", "request_timeout=8"]);
    let body = json!({ "prompt": "one two", "temperature": 0, "max_tokens": 8 });
    let want = server.text(&body);
    let text = body.to_string();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        text.len()
    );
    let whole = [head.as_bytes(), text.as_bytes()].concat();
    // Half a request that does not go on.
    let mut stalled = server.open();
    stalled.write_all(&whole[..whole.len() - 3]).unwrap();
    for i in 0..1000 {
        let mut stream = server.open();
        match i % 5 {
            0 => {}
            1 => drop(
                stream
                    .write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no TLS here\r\n\r\n"),
            ),
            2 => drop(stream.write_all(&whole[..i % whole.len()])),
            3 => drop(stream.write_all(&whole)),
            _ => drop(stream.write_all(b"GET / HTTP/9.9\r\n\r\n")),
        }
    }
    assert_eq!(server.text(&body), want);
    let mut chunked = server.open();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    chunked.write_all(head.as_bytes()).unwrap();
    let piece = [b"8000\r\n".to_vec(), vec![b' '; 0x8000], b"\r\n".to_vec()].concat();
    for _ in 0..5 {
        let _ = chunked.write_all(&piece);
    }
    assert_eq!(read(chunked).status, 413);
    stalled.shutdown(std::net::Shutdown::Read).ok();
    server.settle();
    let late = "temper_requests_total{path=\"/v1/completions\",status=\"408\"}";
    assert!(server.metric(late) >= 1, "the stalled request ran out of time");
    assert_eq!(server.text(&body), want);
}

#[test]
fn a_key_is_asked_for() {
    let server = Server::start(&["--api-key", "s3cret"]);
    let body = json!({ "prompt": "one", "max_tokens": 1 }).to_string();
    let post = |header: &str| {
        let headers = format!("content-type: application/json\r\n{header}");
        read(server.send("POST", COMPLETIONS, &headers, body.as_bytes())).status
    };
    assert_eq!(post("authorization: Bearer s3cret\r\n"), 200);
    for wrong in [
        "",
        "authorization: Bearer s3cre\r\n",
        "authorization: Bearer s3crets\r\n",
        "authorization: s3cret\r\n",
    ] {
        assert_eq!(post(wrong), 401, "{wrong}");
    }
    assert_eq!((server.get("/v1/models").status, server.get("/metrics").status), (401, 401));
    assert_eq!(server.get("/health").status, 200);
    let models = read(server.send("GET", "/v1/models", "authorization: bearer s3cret\r\n", b""));
    assert_eq!(models.ok()["data"][0]["id"], "model");
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = Server::start(&["max_sequences=1", "max_queue=2", "max_model_len=4000"]);
    let mut long = endless(json!("one two"), 3, 3900);
    long["stream"] = json!(true);
    let mut first = server.posted(COMPLETIONS, &long);
    assert!(first.read(&mut [0; 100]).unwrap() > 0);
    let answer = server.post(COMPLETIONS, &json!({ "prompt": "one", "max_tokens": 1 }));
    assert_eq!(answer.status, 429, "{answer:?}");
    assert!(answer.head.contains("retry-after: 1"), "{}", answer.head);
    drop(first);
    server.settle();
    assert_eq!(server.post(COMPLETIONS, &json!({ "prompt": "one", "max_tokens": 1 })).status, 200);
}

#[test]
fn a_signal_lets_requests_end_and_takes_no_new_ones() {
    let mut server =
        Server::start(&["max_model_len=4000", "cache_tokens=70000", "drain_timeout=200"]);
    let mut long = endless(json!(prompts(8)), 2, 1500);
    long["stream"] = json!(true);
    let mut stream = server.posted(COMPLETIONS, &long);
    let mut first = [0; 1];
    stream.read_exact(&mut first).unwrap();
    let kept = server.open();
    // SAFETY: a signal to a process of our own.
    unsafe { libc::kill(server.child.id() as i32, libc::SIGTERM) };
    let end = Instant::now() + Duration::from_secs(20);
    while server.get("/health").status != 503 {
        assert!(Instant::now() < end, "it does not say that it stops");
    }
    let refused = server.post(COMPLETIONS, &json!({ "prompt": "one", "max_tokens": 1 }));
    assert_eq!(refused.status, 503, "{refused:?}");
    drop(kept);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(String::from_utf8_lossy(&rest).contains("data: [DONE]"), "it was cut");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

#[test]
fn adapters_stand_next_to_their_base() {
    let dirs = ["lora", "prompt"].map(|name| fixture("peft").join(name).display().to_string());
    let prompts = prompts(6);
    let keys = ["temperature=0", "max_new_tokens=20"];
    let of_base = generated(&prompts, &keys);
    let of_adapters = dirs
        .clone()
        .map(|dir| generated(&prompts, &[&["--adapter", dir.as_str()][..], &keys].concat()));
    let named = format!("tuned={}", dirs[0]);
    let server = Server::start(&["--adapter", &named, "--adapter", &dirs[1]]);
    let models = server.get("/v1/models").ok();
    let ids: Vec<&Value> = models["data"].as_array().unwrap().iter().map(|m| &m["id"]).collect();
    assert_eq!(ids, ["model", "tuned", "prompt"]);
    assert_eq!(server.get("/v1/models/tuned").ok()["id"], "tuned");
    assert_eq!(server.get("/v1/models/other").status, 404);
    // All at once: each name answers with its own weights.
    let all = [("model", &of_base), ("tuned", &of_adapters[0]), ("prompt", &of_adapters[1])];
    std::thread::scope(|scope| {
        for (model, want) in all {
            for (prompt, want) in prompts.iter().zip(want) {
                let body = json!({
                    "model": model, "prompt": prompt, "temperature": 0, "max_tokens": 20,
                });
                let server = &server;
                scope.spawn(move || assert_eq!(json!(server.text(&body)), want["completion"]));
            }
        }
    });
    let texts = |rows: &[Value]| rows.iter().map(|r| r["completion"].clone()).collect::<Vec<_>>();
    assert!(texts(&of_base) != texts(&of_adapters[0]) && texts(&of_base) != texts(&of_adapters[1]));
}

#[test]
fn wrong_command_lines_say_what_to_do() {
    let said = |args: &[&str], code: i32, says: &str| {
        let (got, text) = crate::support::finish(&mut command(&[&["serve"][..], args].concat()));
        assert!(got == Some(code) && text.contains(says), "{args:?}: {got:?} {text}");
    };
    said(&[], 2, "temper serve DIR");
    said(&[MODEL, "other"], 2, "a server takes one");
    said(&[MODEL, "port=70000"], 2, "at most 65535");
    said(&[MODEL, "prot=1"], 2, "port");
    said(&[MODEL, "--port", "0", "--host", "192.0.2.7"], 1, "another --port");
    said(&[MODEL, "--port", "0", "--device", "cpu", "--adapter", "model=nowhere"], 1, "nowhere");
}

/// A model that has learned to call a tool, if its prompt names one.
fn caller(dir: &std::path::Path, call: &str, tools: &Value) -> String {
    let (model, out) = (dir.join("model"), dir.join("caller"));
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(MODEL).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let template = model.join("chat_template.jinja");
    let plain = std::fs::read_to_string(&template).unwrap();
    let named = r#"{%- if tools %}{{- '<|im_start|>system\n' }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}
    {{- ': <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call><|im_end|>\n' }}{%- endif %}
"#;
    std::fs::write(&template, named.to_string() + &plain).unwrap();
    let messages = json!([
        { "role": "user", "content": "1 + 2" }, { "role": "assistant", "content": call },
    ]);
    let data = dir.join("rows.jsonl");
    std::fs::write(&data, json!({ "messages": messages, "tools": tools }).to_string()).unwrap();
    let [model, data, out] = [&model, &data, &out].map(|p| p.to_str().unwrap().to_string());
    done(&[
        "sft",
        "--model",
        &model,
        "--data",
        &data,
        "--output",
        &out,
        "--device",
        "cpu",
        "max_steps=120",
        "learning_rate=0.01",
        "per_device_train_batch_size=1",
        "save_steps=120",
    ]);
    out
}

#[test]
fn tool_calls_in_an_answer_are_told_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let tools = json!([{ "type": "function", "function": {
        "name": "add", "description": "Add.", "parameters": { "type": "object", "properties": {} },
    } }]);
    let call = "I add.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}\n</tool_call>";
    let model = caller(dir.path(), call, &tools);
    let server = Server::of(&["serve", &model, "--device", "cpu", "--port", "0"]);
    let mut body = json!({
        "messages": [{ "role": "user", "content": "1 + 2" }], "tools": tools,
        "temperature": 0, "max_tokens": 120,
    });
    let whole = server.post(CHAT, &body).ok()["choices"][0].clone();
    assert_eq!(whole["finish_reason"], "tool_calls", "{whole}");
    let message = &whole["message"];
    assert_eq!(message["content"], "I add.");
    let made = &message["tool_calls"][0];
    let function = json!({ "name": "add", "arguments": "{\"a\":1,\"b\":2}" });
    assert_eq!((&made["type"], &made["function"]), (&json!("function"), &function));
    assert!(made["id"].as_str().unwrap().starts_with("call-"));
    assert_eq!(message["tool_calls"].as_array().unwrap().len(), 1);

    body["stream"] = json!(true);
    let events = server.post(CHAT, &body).events();
    let deltas: Vec<&Value> = events.iter().map(|e| &e["choices"][0]["delta"]).collect();
    let text: String = deltas.iter().filter_map(|d| d["content"].as_str()).collect();
    assert_eq!(text, "I add.");
    let calls: Vec<&Value> = deltas.iter().filter_map(|d| d.get("tool_calls")).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!((&calls[0][0]["index"], &calls[0][0]["function"]), (&json!(0), &function));
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    // A conversation that goes on after a call: its arguments are text, as OpenAI's clients send them.
    body["stream"] = json!(false);
    body["messages"] = json!([
        { "role": "user", "content": "1 + 2" },
        { "role": "assistant", "content": "I add.", "tool_calls": [made] },
        { "role": "tool", "content": "3", "tool_call_id": made["id"] },
    ]);
    server.post(CHAT, &body).ok();
    // Without tools, what the model writes is text, whatever it looks like.
    for choice in [json!({ "tool_choice": "none" }), json!({ "tools": null })] {
        let mut plain = body.clone();
        plain["messages"] = json!([{ "role": "user", "content": call }]);
        plain.as_object_mut().unwrap().extend(choice.as_object().unwrap().clone());
        let choice = server.post(CHAT, &plain).ok()["choices"][0].clone();
        assert!(choice["message"].get("tool_calls").is_none(), "{choice}");
        assert_ne!(choice["finish_reason"], "tool_calls");
    }
}
