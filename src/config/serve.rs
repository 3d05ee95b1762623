//! Options of `temper serve`. Layer 1.
//!
//! Invariant: an option bounds what a client can ask for, never what a model answers.

use super::{Report, TemplateOptions, section};

section! {
    /// Options of `temper serve`.
    pub struct ServeConfig = "serve" {
        /// Address to listen on. 127.0.0.1: this machine only. 0.0.0.0: all its networks.
        pub host: String = "127.0.0.1".into(),
        /// Port to listen on. 0: a free one, which is printed.
        pub port: usize = 8000,
        /// Key that requests must send as `Authorization: Bearer KEY`. The environment variable
        /// TEMPER_API_KEY sets it too, hidden from other users. none: no key is needed.
        pub api_key: Option<String> = None,
        /// Name of the model in requests. none: the last part of its folder's name.
        pub served_name: Option<String> = None,
        /// Most tokens of a prompt and its completion together. none: max_position_embeddings of the
        /// model, at most 8192.
        pub max_model_len: Option<usize> = None,
        /// Most tokens of a completion. none: what the prompt leaves of max_model_len.
        pub max_new_tokens: Option<usize> = None,
        /// Sequences decoded at once, for each name.
        pub max_sequences: usize = 64,
        /// Tokens whose keys and values are held at once, for each name; at least max_model_len. If
        /// they do not suffice, sequences wait or start again.
        pub cache_tokens: usize = 32768,
        /// Most tokens in one step; longer prompts are prefilled in pieces.
        pub step_tokens: usize = 2048,
        /// Most waiting sequences, all names together; more are refused with 429.
        pub max_queue: usize = 1024,
        /// Largest body of a request in bytes.
        pub max_request_bytes: usize = 4 << 20,
        /// Most seconds for a request, including its wait.
        pub request_timeout: usize = 600,
        /// Seconds that running requests get to finish after SIGTERM or Ctrl-C.
        pub drain_timeout: usize = 30,
        ..pub template: TemplateOptions = TemplateOptions::default(),
    }
}

impl ServeConfig {
    fn rules(&self, report: &mut Report) {
        report.must(self.port < 1 << 16, || {
            format!("port = {}: must be at most 65535; 0 picks a free port", self.port)
        });
        let counts = [
            ("max_model_len", self.max_model_len.unwrap_or(2), 2),
            ("max_new_tokens", self.max_new_tokens.unwrap_or(1), 1),
            ("max_sequences", self.max_sequences, 1),
            ("cache_tokens", self.cache_tokens, 1),
            ("step_tokens", self.step_tokens, 1),
            ("max_request_bytes", self.max_request_bytes, 1),
            ("request_timeout", self.request_timeout, 1),
        ];
        counts.into_iter().for_each(|(name, value, least)| report.at_least(name, value, least));
        report.must(self.api_key.as_deref() != Some(""), || {
            "api_key is empty; leave it out, or give a key".into()
        });
    }
}
