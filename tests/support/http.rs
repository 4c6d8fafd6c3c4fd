//! A small blocking HTTP/1.1 server that can also misbehave in the ways networks and proxies do.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;

const LARGEST_HEAD: u64 = 64 * 1024;
const LARGEST_BODY: usize = 4 * 1024 * 1024;
const DRIP: Duration = Duration::from_millis(200);
const JSON: &str = "application/json";

/// One request, read to its end.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// The target as sent, with its query.
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    /// The first header of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The target without its query.
    pub fn route(&self) -> &str {
        self.path.split('?').next().unwrap_or_default()
    }

    /// The decoded parameters of the query.
    pub fn query(&self) -> Vec<(String, String)> {
        form(self.path.split_once('?').map_or("", |(_, query)| query))
    }

    /// One parameter of the query.
    pub fn parameter(&self, name: &str) -> Option<String> {
        self.query().into_iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }
}

/// What the server does with a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// One byte of the body every 200 ms, so that a limit per read never strikes.
    Drip,
    Full {
        status: u16,
        content_type: String,
        headers: Vec<(String, String)>,
        body: Vec<u8>,
    },
    /// Never answers.
    Hang,
    /// A head and half of its body, then nothing.
    HangInBody,
    /// A well-formed JSON document of that many bytes, nearly all of them blanks.
    Huge(u64),
    /// These bytes instead of an answer, then the end of the connection.
    Raw(Vec<u8>),
    /// The end of the connection instead of an answer.
    Reset,
    /// A declared length, and fewer bytes before the end of the connection.
    Truncate,
}

impl Reply {
    pub fn json(status: u16, body: &Value) -> Self {
        Self::typed(status, JSON, body.to_string())
    }

    pub fn text(status: u16, body: &str) -> Self {
        Self::typed(status, "text/plain; charset=utf-8", body)
    }

    pub fn typed(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::Full { status, content_type: content_type.to_owned(), headers: Vec::new(), body: body.into() }
    }

    /// Adds a header to a full reply; the others have none of their own.
    pub fn with_header(mut self, name: &str, value: &str) -> Self {
        if let Self::Full { headers, .. } = &mut self {
            headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }
}

/// The server; ends with all its connections when dropped.
pub struct HttpServer {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    tls: Option<Arc<ServerConfig>>,
    handler: Box<dyn Fn(&Request) -> Reply + Send + Sync>,
    stopping: AtomicBool,
    requests: AtomicU64,
    accepted: AtomicU64,
    open: Mutex<HashMap<u64, TcpStream>>,
}

impl HttpServer {
    /// Listens on a free port of the loopback address, with TLS if a configuration is given.
    pub fn start(tls: Option<Arc<ServerConfig>>, handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port is free");
        let port = listener.local_addr().expect("a bound listener has an address").port();
        let shared = Arc::new(Shared {
            tls,
            handler: Box::new(handler),
            stopping: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.accept(&listener)
        });
        Self { port, shared, acceptor: Some(acceptor) }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many requests arrived whole.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Ends the connections that are open now, as a restart of the server would.
    pub fn disconnect(&self) {
        for stream in lock(&self.shared.open).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.disconnect();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn accept(&self, listener: &TcpListener) {
        thread::scope(|scope| {
            for stream in listener.incoming() {
                if self.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                scope.spawn(move || self.connection(&stream));
            }
        });
    }

    fn connection(&self, stream: &TcpStream) {
        let id = self.accepted.fetch_add(1, Ordering::SeqCst);
        let Ok(known) = stream.try_clone() else { return };
        lock(&self.open).insert(id, known);
        // After the insertion, so that a stop in between is seen here or by disconnect.
        if !self.stopping.load(Ordering::SeqCst) {
            // An error here is the client's way to go.
            let _ = self.serve(stream);
        }
        let _ = stream.shutdown(Shutdown::Both);
        lock(&self.open).remove(&id);
    }

    fn serve(&self, tcp: &TcpStream) -> io::Result<()> {
        tcp.set_nodelay(true)?;
        let wire: Box<dyn Wire> = match &self.tls {
            None => Box::new(tcp.try_clone()?),
            Some(config) => {
                let session = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                Box::new(StreamOwned::new(session, tcp.try_clone()?))
            }
        };
        let mut wire = BufReader::new(wire);
        while let Some(head) = read_head(&mut wire)? {
            let Some((request, keep)) = read_request(&head, &mut wire)? else {
                return write(&mut wire, &full(400, "text/plain", &[], b"not understood\n"));
            };
            self.requests.fetch_add(1, Ordering::SeqCst);
            let reply = (self.handler)(&request);
            if !answer(reply, &request, &mut wire, tcp)? || !keep {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The decoded pairs of a query or form.
pub fn form(text: &str) -> Vec<(String, String)> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(n, v)| (decode(n), decode(v))).collect()
}

/// The lock, also after a panic of another test thread.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

trait Wire: Read + Write {}

impl<T: Read + Write> Wire for T {}

type Stream = BufReader<Box<dyn Wire>>;

/// The lines before the empty one; None at the end of the connection.
fn read_head(wire: &mut Stream) -> io::Result<Option<Vec<String>>> {
    let mut bounded = wire.take(LARGEST_HEAD);
    let mut lines = Vec::new();
    loop {
        let mut line = Vec::new();
        if bounded.read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        let line = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
        if line.is_empty() {
            return Ok(Some(lines));
        }
        lines.push(line);
    }
}

/// The request and whether its connection stays; None if it is not understood.
fn read_request(head: &[String], wire: &mut Stream) -> io::Result<Option<(Request, bool)>> {
    let Some((first, lines)) = head.split_first() else { return Ok(None) };
    let &[method, path, version] = first.split(' ').collect::<Vec<_>>().as_slice() else { return Ok(None) };
    let pairs = lines.iter().map(|line| line.split_once(':'));
    let headers: Option<Vec<_>> =
        pairs.map(|pair| pair.map(|(name, value)| (name.to_owned(), value.trim().to_owned()))).collect();
    let Some(headers) = headers else { return Ok(None) };
    let mut request = Request { method: method.to_owned(), path: path.to_owned(), headers, body: Vec::new() };
    let length = request.header("content-length").map_or(Ok(0), str::parse::<usize>);
    let Ok(length) = length else { return Ok(None) };
    if length > LARGEST_BODY || request.header("transfer-encoding").is_some() {
        return Ok(None);
    }
    request.body.resize(length, 0);
    wire.read_exact(&mut request.body)?;
    let close = request.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    Ok(Some((request, version == "HTTP/1.1" && !close)))
}

/// Whether the connection can go on.
fn answer(reply: Reply, request: &Request, wire: &mut Stream, tcp: &TcpStream) -> io::Result<bool> {
    let body: &[u8] = br#"{"data":[]}"#;
    match reply {
        Reply::Full { status, content_type, headers, body } => {
            let mut bytes = full(status, &content_type, &headers, &body);
            if request.method == "HEAD" {
                bytes.truncate(bytes.len() - body.len());
            }
            write(wire, &bytes)?;
            return Ok(true);
        }
        Reply::Drip => {
            write(wire, &head(200, JSON, &[], 1 << 20))?;
            tcp.set_read_timeout(Some(DRIP))?;
            while is_open(tcp) {
                write(wire, b" ")?;
            }
        }
        Reply::Hang => while is_open(tcp) {},
        Reply::HangInBody => {
            write(wire, &[head(200, JSON, &[], body.len() as u64).as_slice(), &body[..body.len() / 2]].concat())?;
            while is_open(tcp) {}
        }
        Reply::Huge(length) => huge(wire, length)?,
        Reply::Raw(bytes) => write(wire, &bytes)?,
        Reply::Reset => {}
        Reply::Truncate => write(wire, &[head(200, JSON, &[], 1000).as_slice(), body].concat())?,
    }
    Ok(false)
}

/// Waits for bytes nobody needs, or for the read timeout; false when the connection has ended.
fn is_open(mut tcp: &TcpStream) -> bool {
    match tcp.read(&mut [0; 1024]) {
        Ok(count) => count > 0,
        Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
    }
}

fn huge(wire: &mut Stream, length: u64) -> io::Result<()> {
    let (start, end) = (br#"{"data":["#, b"]}");
    let mut blanks = length.saturating_sub((start.len() + end.len()) as u64);
    write(wire, &[head(200, JSON, &[], blanks + (start.len() + end.len()) as u64).as_slice(), start].concat())?;
    let chunk = [b' '; 64 * 1024];
    while blanks > 0 {
        let now = blanks.min(chunk.len() as u64);
        write(wire, &chunk[..now as usize])?;
        blanks -= now;
    }
    write(wire, end)
}

fn full(status: u16, content_type: &str, headers: &[(String, String)], body: &[u8]) -> Vec<u8> {
    let mut bytes = head(status, content_type, headers, body.len() as u64);
    bytes.extend_from_slice(body);
    bytes
}

fn head(status: u16, content_type: &str, headers: &[(String, String)], length: u64) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} {}\r\n", phrase(status));
    text += &format!("Content-Type: {content_type}\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    (text + "\r\n").into_bytes()
}

fn write(wire: &mut Stream, bytes: &[u8]) -> io::Result<()> {
    wire.get_mut().write_all(bytes)?;
    wire.get_mut().flush()
}

fn phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        301 | 302 | 307 | 308 => "Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        410 => "Gone",
        422 => "Unprocessable Entity",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Status",
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        let hex = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match (first, hex.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) => bytes.push(b' '),
            (&other, _) => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
