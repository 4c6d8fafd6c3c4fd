//! A strict stand-in of Sysdig Monitor: its Data API and its catalogue of metrics.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use serde_json::{Value, json};

use super::clock::http_date;
use super::http::{HttpServer, Reply, Request, lock};

mod answer;
mod filter;
mod question;
mod world;

pub use filter::Filter;
pub use question::{Question, Refusal};
pub use world::{Container, Series, World, catalogue};

const HUGE: u64 = 64 * 1024 * 1024;
const LARGEST_PAGE: usize = 5000;
const DEFAULT_PAGE: usize = 100;

/// What is wrong with Sysdig, or with the way to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 200 with this text, declared as JSON.
    Body(String),
    Drip,
    /// 200 without rows.
    Empty,
    /// Rows that are that many seconds younger than they should be.
    Future(i64),
    /// 200 with a page that a captive portal would send.
    Garbage,
    Hang,
    HangInBody,
    /// Answers as usual, but not before [`Sysdig::heal`].
    Hold,
    Huge,
    Reset,
    /// Rows that are that many seconds older than they should be.
    Stale(i64),
    Status(u16),
    StatusWithRetryAfter(u16, u64),
    Truncated,
}

/// The stand-in; ends when dropped.
pub struct Sysdig {
    server: HttpServer,
    shared: Arc<Shared>,
    scheme: &'static str,
}

struct Shared {
    world: Mutex<World>,
    state: Mutex<State>,
    healed: Condvar,
}

#[derive(Default)]
struct State {
    token: String,
    fault: Option<Fault>,
    held: usize,
    latency: Duration,
    queries: Vec<Value>,
    refusals: Vec<Value>,
}

impl Sysdig {
    /// Serves plain HTTP with an empty account.
    pub fn start(token: &str) -> Self {
        Self::start_with(token, None)
    }

    /// Serves HTTPS if a configuration is given.
    pub fn start_with(token: &str, tls: Option<Arc<ServerConfig>>) -> Self {
        let shared = Arc::new(Shared {
            world: Mutex::default(),
            state: Mutex::new(State { token: token.to_owned(), ..State::default() }),
            healed: Condvar::new(),
        });
        let scheme = if tls.is_some() { "https" } else { "http" };
        let server = HttpServer::start(tls, {
            let shared = Arc::clone(&shared);
            move |request| shared.answer(request)
        });
        Self { server, shared, scheme }
    }

    /// As in `SDC_ENDPOINT`, without a path.
    pub fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.server.port())
    }

    /// The account; no question is answered while it is held.
    pub fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.shared.world)
    }

    /// From now on this is the one token that is accepted.
    pub fn set_token(&self, token: &str) {
        token.clone_into(&mut lock(&self.shared.state).token);
    }

    pub fn fail(&self, fault: Fault) {
        lock(&self.shared.state).fault = Some(fault);
        self.shared.healed.notify_all();
    }

    pub fn heal(&self) {
        lock(&self.shared.state).fault = None;
        self.shared.healed.notify_all();
    }

    /// From now on every answer takes so long.
    pub fn delay(&self, latency: Duration) {
        lock(&self.shared.state).latency = latency;
    }

    /// How many requests wait for the end of [`Fault::Hold`].
    pub fn held(&self) -> usize {
        lock(&self.shared.state).held
    }

    /// The bodies of all questions to the Data API that were valid.
    pub fn queries(&self) -> Vec<Value> {
        lock(&self.shared.state).queries.clone()
    }

    /// The error bodies of all requests that were refused for what they are.
    pub fn refusals(&self) -> Vec<Value> {
        lock(&self.shared.state).refusals.clone()
    }

    /// How many requests arrived, of any kind and whatever their answer.
    pub fn request_count(&self) -> u64 {
        self.server.requests()
    }

    pub fn server(&self) -> &HttpServer {
        &self.server
    }
}

impl Drop for Sysdig {
    fn drop(&mut self) {
        self.heal();
    }
}

impl Shared {
    fn answer(&self, request: &Request) -> Reply {
        let fault = self.fault();
        std::thread::sleep(lock(&self.state).latency);
        let reply = match &fault {
            Some(Fault::Body(text)) => Reply::typed(200, "application/json", text.as_str()),
            Some(Fault::Drip) => Reply::Drip,
            Some(Fault::Garbage) => page(200, "Sign in to this network"),
            Some(Fault::Hang) => Reply::Hang,
            Some(Fault::HangInBody) => Reply::HangInBody,
            Some(Fault::Huge) => Reply::Huge(HUGE),
            Some(Fault::Reset) => Reply::Reset,
            Some(Fault::Status(status)) => failure(*status, request),
            Some(Fault::StatusWithRetryAfter(status, seconds)) => {
                failure(*status, request).with_header("Retry-After", &seconds.to_string())
            }
            Some(Fault::Truncated) => Reply::Truncate,
            None | Some(Fault::Empty | Fault::Future(_) | Fault::Hold | Fault::Stale(_)) => {
                self.handle(request, fault.as_ref()).unwrap_or_else(|refusal| {
                    lock(&self.state).refusals.push(refusal.body.clone());
                    Reply::json(refusal.status, &refusal.body)
                })
            }
        };
        reply.with_header("Date", &http_date(lock(&self.world).now()))
    }

    /// The fault of this moment, once it is not to hold any more.
    fn fault(&self) -> Option<Fault> {
        let mut state = lock(&self.state);
        state.held += 1;
        let is_held = |state: &mut State| state.fault == Some(Fault::Hold);
        let mut state = self.healed.wait_while(state, is_held).unwrap_or_else(PoisonError::into_inner);
        state.held -= 1;
        state.fault.clone()
    }

    /// One arm per API: whatever else Sysdig offers gets its arm and its file.
    fn handle(&self, request: &Request, fault: Option<&Fault>) -> Result<Reply, Refusal> {
        let token = format!("Bearer {}", lock(&self.state).token);
        if request.header("authorization") != Some(&token) {
            return Ok(failure(401, request));
        }
        match (request.method.as_str(), request.route()) {
            ("POST", "/api/data" | "/api/data/") => self.data(request, fault),
            ("GET", "/api/v2/metrics/descriptors") => self.descriptors(request, fault),
            _ => Ok(failure(404, request)),
        }
    }

    fn data(&self, request: &Request, fault: Option<&Fault>) -> Result<Reply, Refusal> {
        let content_type = request.header("content-type").unwrap_or_default();
        if content_type.split(';').next().map(str::trim) != Some("application/json") {
            let message = "Content-Type is not application/json";
            return Err(Refusal::new(415, "Unsupported media type", message, "", &json!(content_type)));
        }
        let world = lock(&self.world);
        let question = Question::parse(&request.body, &world)?;
        lock(&self.state).queries.push(serde_json::from_slice(&request.body).unwrap_or_default());
        let body = match fault {
            Some(Fault::Empty) => json!({ "data": [], "start": question.start, "end": question.end }),
            Some(Fault::Stale(seconds)) => answer::answer(&question, &world, -seconds),
            Some(Fault::Future(seconds)) => answer::answer(&question, &world, *seconds),
            _ => answer::answer(&question, &world, 0),
        };
        Ok(Reply::json(200, &body))
    }

    fn descriptors(&self, request: &Request, fault: Option<&Fault>) -> Result<Reply, Refusal> {
        let (mut limit, mut offset, mut part, mut types) = (DEFAULT_PAGE, 0, String::new(), String::new());
        for (name, value) in request.query() {
            let number = value.parse::<usize>();
            match (name.as_str(), number) {
                ("limit", Ok(number @ 1..=LARGEST_PAGE)) => limit = number,
                ("offset", Ok(number)) => offset = number,
                ("filter", _) => part = value,
                ("metricTypes", _) => types = value,
                _ => return Err(Refusal::new(400, "Invalid value", "not understood", &name, &json!(value))),
            }
        }
        let world = lock(&self.world);
        let wanted = |entry: &&Value| {
            let (id, kind) = (entry["id"].as_str().unwrap_or(""), entry["metricType"].as_str().unwrap_or(""));
            id.contains(&part) && (types.is_empty() || types.split(',').any(|one| one == kind))
        };
        let found: Vec<&Value> = match fault {
            Some(Fault::Empty) => Vec::new(),
            _ => world.descriptors.iter().filter(wanted).collect(),
        };
        let page: Vec<&Value> = found.iter().skip(offset).take(limit).copied().collect();
        let body = json!({ "total": found.len(), "offset": offset, "metricDescriptors": page });
        Ok(Reply::json(200, &body))
    }
}

/// An error as the parts of Sysdig word it: gateway, rate limiter, application, load balancer.
fn failure(status: u16, request: &Request) -> Reply {
    let errors = |reason: &str, message: &str| json!({ "errors": [{ "reason": reason, "message": message }] });
    match status {
        300..=399 => page(status, "Moved").with_header("Location", "/login"),
        401 | 404 => {
            let error = if status == 401 { "Unauthorized" } else { "Not Found" };
            let body = json!({
                "timestamp": super::clock::unix_now() * 1000, "status": status, "error": error, "path": request.route(),
            });
            Reply::json(status, &body)
        }
        403 => Reply::json(403, &errors("Not enough privileges to complete the action", "Access is denied")),
        429 => {
            let message = "Data rate limit exceeded: data access is blocked for 15 seconds";
            Reply::json(429, &json!({ "type": "RATE_LIMIT", "message": message, "details": [] }))
        }
        500 => Reply::json(500, &errors("Internal error", "Something went wrong")),
        501..=599 => page(status, "The upstream server is not available"),
        _ => Reply::json(status, &errors("Invalid request", "The request cannot be processed")),
    }
}

fn page(status: u16, text: &str) -> Reply {
    Reply::typed(status, "text/html", format!("<html><body><h1>{text}</h1></body></html>\n"))
}
