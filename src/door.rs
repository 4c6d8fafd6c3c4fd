//! The TLS port: accepts, bounds, shakes hands, and hands over one request at a time.
//! Every connection has a thread. It reads one complete head, judges the client certificate against the configuration
//! of that moment, opens a Unix socket to the inner server of the request's class, sends the head anew, relays the
//! answer and goes on: the inner server's pool cannot starve, and nothing can be smuggled behind a request.

use crate::prelude::*;
use crate::{handler, handler::Handler, head::Head, random, requestheader::RequestHeader};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::ErrorKind::{InvalidInput, UnexpectedEof, WouldBlock};
use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::{os::unix::net::UnixStream, path::Path, path::PathBuf};

/// For a handshake, for a head, and for an answer to be taken.
const STEP: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(120);
/// Longer than the longest answer takes.
const INNER: Duration = Duration::from_secs(60);
/// A verdict on a certificate is used again for so long on the same connection.
const VERDICT: Duration = Duration::from_secs(1);
/// How long a new connection waits for the end of one that was closed for it.
const ENDING: Duration = Duration::from_secs(1);
const LINGER: Duration = Duration::from_millis(500);
/// More than the largest head, so that whoever sent one reads why it was refused.
const LINGER_BYTES: u64 = 2 * 1024 * 1024;
const HEAD_UNVERIFIED: u64 = 32 * 1024;
const HEAD_FRONT_PROXY: u64 = 1024 * 1024;

pub(crate) struct Door {
    pub(crate) connections: &'static Connections,
    pub(crate) tls: Arc<ServerConfig>,
    pub(crate) trust: &'static Trust,
    /// The inner servers for requests over verified front-proxy connections, and for all others.
    pub(crate) front_proxy: PathBuf,
    pub(crate) direct: PathBuf,
    /// Connections are closed at this age or up to a fifth later, so that replicas share the load.
    pub(crate) age: Duration,
}

impl Door {
    pub(crate) fn connection(&self, stream: &TcpStream, ticket: &Ticket) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let session = ServerConnection::new(self.tls.clone()).map_err(io::Error::other)?;
        let mut tls = StreamOwned::new(session, Timed { stream, deadline: Instant::now() + STEP });
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock)?;
        }
        let mut peer = Peer { tls, ticket, verdict: None };
        let (retire, mut last) = (Instant::now() + self.age.mul_f64(1.0 + random() / 5.0), false);
        while !last {
            let verified = peer.judge(self.trust, None).is_some();
            let Some(head) = peer.read_head(verified) else { break };
            let answered = head.and_then(|head| self.answer(&mut peer, &head));
            let (answer, keep) = answered.or_else(|error| refuse(&error).map(|answer| (answer, false)))?;
            last = !keep || self.connections.draining.load(Relaxed) || Instant::now() >= retire;
            peer.send(answer, last)?;
        }
        peer.close()
    }

    /// The inner server's answer, and whether the connection can go on.
    fn answer(&self, peer: &mut Peer<'_>, head: &[u8]) -> Result<(Vec<u8>, bool), Error> {
        let head = Head::parse(head)?;
        let identity = peer.judge(self.trust, Some(!self.connections.crowded()));
        let socket = if identity.is_some() { &self.front_proxy } else { &self.direct };
        let answer = exchange(socket, &head.rebuild(identity.as_ref().map(|config| &config.headers)));
        let answer = answer.inspect_err(|error| log::warn!("inner server: {error}"));
        let failed = |_| refusal!(Internal, "the adapter failed to answer; its log says why (kubectl logs)");
        Ok((answer.map_err(failed)?, head.keep_alive))
    }
}

/// Gives each connection one of the `places`, and a thread that does `work` with it.
pub(crate) fn accept(
    listener: &TcpListener, places: &'static Connections,
    work: impl Fn(&TcpStream, &Ticket) -> io::Result<()> + Copy + Send + 'static,
) {
    let open = |stream: TcpStream| {
        let stream = Arc::new(stream);
        let Some(ticket) = places.admit(&stream) else { return Ok(()) };
        let work = move || work(&stream, &ticket).unwrap_or_else(|error| log::debug!("connection: {error}"));
        handler::spawn("connection", work).inspect_err(|error| log::warn!("a connection was refused: {error}"))
    };
    for stream in listener.incoming() {
        if let Err(error) = stream.and_then(open) {
            // Out of file descriptors or threads, most likely: connections end all the time.
            log::debug!("accept: {error}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Answers whatever is asked for in the clear: there is one thing here, and little time. HTTP/1.0 keeps no connection.
pub(crate) fn scrape(stream: &TcpStream, handler: &Handler) -> io::Result<()> {
    let mut plain = Timed { stream, deadline: Instant::now() + STEP };
    let lines = io::BufReader::new(Read::take(&mut plain, HEAD_UNVERIFIED)).lines();
    let complete = lines.map_while(Result::ok).any(|line| line.is_empty());
    if complete { metrics::page(handler).raw_print(plain, (1, 0).into(), &[], false, None) } else { Ok(()) }
}

fn exchange(socket: &Path, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut inner = UnixStream::connect(socket)?;
    inner.set_read_timeout(Some(INNER))?;
    inner.set_write_timeout(Some(STEP))?;
    inner.write_all(request)?;
    inner.shutdown(Shutdown::Write)?;
    let mut answer = Vec::with_capacity(2048);
    inner.read_to_end(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 ") { Ok(answer) } else { Err(UnexpectedEof.into()) }
}

/// A refusal of the door's own, printed and taken down.
fn refuse(error: &Error) -> io::Result<Vec<u8>> {
    let (mut answer, response) = (Vec::new(), error.response());
    let (code, reason) = (response.status_code().0, error.reason.word());
    let labels = format!(r#"route="door",code="{code}",reason="{reason}",waited_for="Nothing""#);
    metrics::add("request_duration_seconds", labels, 0.0);
    response.raw_print(&mut answer, (1, 1).into(), &[], false, None)?;
    Ok(answer)
}

/// A socket whose reads and writes end at one deadline, however slowly the bytes come. Once it is over, what is left
/// until then is no timeout that a socket takes: InvalidInput.
struct Timed<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.deadline.saturating_duration_since(Instant::now())))?;
        self.stream.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.deadline.saturating_duration_since(Instant::now())))?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Peer<'a> {
    tls: StreamOwned<ServerConnection, Timed<'a>>,
    ticket: &'a Ticket,
    /// How the certificate was judged, under which configuration and when.
    verdict: Option<(Arc<RequestHeader>, Instant, bool)>,
}

impl Peer<'_> {
    /// The configuration under which this peer speaks for users, if it does; with `wait` a new one in a rotation, too.
    fn judge(&mut self, trust: &Trust, wait: Option<bool>) -> Option<Arc<RequestHeader>> {
        self.tls.conn.peer_certificates()?;
        let current = lock(&trust.current).clone();
        current.filter(|it| self.accepts(it)).or_else(|| trust.refreshed(wait?).filter(|it| self.accepts(it)))
    }

    fn accepts(&mut self, config: &Arc<RequestHeader>) -> bool {
        if !self.verdict.as_ref().is_some_and(|(under, at, _)| Arc::ptr_eq(under, config) && at.elapsed() < VERDICT) {
            let judged = config.judge(self.tls.conn.peer_certificates().unwrap_or_default(), unix_now());
            let verified = judged.inspect_err(|reason| log::debug!("client certificate: {reason}")).is_ok();
            self.verdict = Some((config.clone(), Instant::now(), verified));
        }
        self.verdict.as_ref().is_some_and(|(.., verified)| *verified)
    }

    /// The next head; None if the peer is done or silent for too long.
    fn read_head(&mut self, verified: bool) -> Option<Result<Vec<u8>>> {
        let limit = if verified { HEAD_FRONT_PROXY } else { HEAD_UNVERIFIED };
        self.ticket.set(verified, false);
        self.tls.sock.deadline = Instant::now() + IDLE;
        let mut received = self.tls.fill_buf().map(<[u8]>::len);
        let begun = matches!(received, Ok(1..));
        self.ticket.set(verified, begun);
        self.tls.sock.deadline = Instant::now() + STEP;
        let (mut head, mut bounded) = (Vec::new(), Read::take(&mut self.tls, limit));
        while matches!(received, Ok(1..)) && !head.ends_with(b"\r\n\r\n") {
            received = bounded.read_until(b'\n', &mut head);
        }
        Some(match received.inspect_err(|error| log::debug!("connection: {error}")).map_err(|error| error.kind()) {
            Ok(1..) => Ok(head),
            Ok(0) if bounded.limit() == 0 => Err(refusal!(HeadTooLarge, "the request head is larger than {limit} bytes")),
            Err(InvalidInput | WouldBlock) if begun => Err(refusal!(RequestTimeout, "the request head took over {STEP:?}")),
            _ => return None,
        })
    }

    fn send(&mut self, mut answer: Vec<u8>, last: bool) -> io::Result<()> {
        self.tls.sock.deadline = Instant::now() + STEP;
        let headers = answer.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let close = if last { &b"Connection: close\r\n"[..] } else { b"" };
        answer.splice(headers..headers, close.iter().copied());
        self.tls.write_all(&answer)?;
        self.tls.flush()
    }

    /// Lets the last answer arrive: unread bytes would make the kernel reset the connection, so some are dropped.
    fn close(&mut self) -> io::Result<()> {
        self.tls.sock.deadline = Instant::now() + LINGER;
        self.tls.conn.send_close_notify();
        self.tls.flush()?;
        self.tls.sock.stream.shutdown(Shutdown::Write)?;
        let _ = io::copy(&mut Read::take(&mut self.tls.sock, LINGER_BYTES), &mut io::sink());
        Ok(())
    }
}

/// The live connections: how many there may be, who makes room for whom, and the end of them all.
#[derive(Default)]
pub(crate) struct Connections {
    pub(crate) places: usize,
    /// In the order they came.
    pub(crate) live: Mutex<BTreeMap<u64, Entry>>,
    pub(crate) gone: Condvar,
    /// Set by a signal to end: answers are the last of their connections; see [`Self::close_idle`].
    pub(crate) draining: Arc<AtomicBool>,
}

pub(crate) struct Entry {
    stream: Arc<TcpStream>,
    pub(crate) verified: bool,
    pub(crate) busy: bool,
    /// To make room; its thread still ends.
    closed: bool,
}

/// A connection's place; given back when dropped.
pub(crate) struct Ticket(&'static Connections, u64);

impl Connections {
    /// Takes a place. When all are taken, the oldest connection that proved nothing is closed for the new one: nobody
    /// can be kept out by silent peers. None if only verified peers hold them, or too many that were closed do not end.
    pub(crate) fn admit(&'static self, stream: &Arc<TcpStream>) -> Option<Ticket> {
        let mut live = lock(&self.live);
        // The other places are for connections that were closed and whose threads still end.
        let usable = self.places - (self.places / 4).max(1);
        if live.values().filter(|entry| !entry.closed).count() >= usable {
            let oldest = live.values_mut().find(|entry| !entry.verified && !entry.closed)?;
            let _ = oldest.stream.shutdown(Shutdown::Both);
            oldest.closed = true;
        }
        let room = self.gone.wait_timeout_while(live, ENDING, |live| live.len() >= self.places);
        let (mut live, patience) = room.unwrap_or_else(PoisonError::into_inner);
        if patience.timed_out() {
            return None;
        }
        let id = live.last_key_value().map_or(0, |(last, _)| last + 1);
        live.insert(id, Entry { stream: stream.clone(), verified: false, busy: false, closed: false });
        Some(Ticket(self, id))
    }

    /// Whether places are scarce, such that nobody unknown should hold one for long.
    pub(crate) fn crowded(&self) -> bool {
        lock(&self.live).len() > self.places / 4
    }

    /// Closes what waits for a request, and waits for what is being answered. True if no connection is left.
    pub(crate) fn close_idle(&self, patience: Duration) -> bool {
        let live = lock(&self.live);
        live.values().filter(|entry| !entry.busy).for_each(|entry| drop(entry.stream.shutdown(Shutdown::Read)));
        let ended = self.gone.wait_timeout_while(live, patience, |live| !live.is_empty());
        ended.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }
}

impl Ticket {
    /// Notes whether the peer proved who it is, and whether a request of it is being worked on.
    pub(crate) fn set(&self, verified: bool, busy: bool) {
        if let Some(entry) = lock(&self.0.live).get_mut(&self.1) {
            (entry.verified, entry.busy) = (verified, busy);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.0.live).remove(&self.1);
        self.0.gone.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::error::Reason;
    use crate::kube::Kube;
    use crate::tls::{Serving, certified_key, pem, server_config};

    #[test]
    fn an_answer_of_the_doors_own_is_plain_http() {
        let text = String::from_utf8(refuse(&Error::new(Reason::Overloaded, "later")).unwrap()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 429 Too Many Requests\r\n") && head.contains("\r\nContent-Type: application/json\r\n"),
            "{head}"
        );
        assert!(head.contains(&format!("Content-Length: {}", body.len())) && head.contains("Retry-After: 1"), "{head}");
    }

    #[test]
    fn what_is_drawn_stays_within_its_bound_and_differs() {
        let drawn: BTreeSet<u64> = (0..100).map(|_| (random() * 1024.0) as u64).collect();
        assert!(drawn.iter().all(|it| *it < 1024) && drawn.len() > 50, "{drawn:?}");
    }

    /// The answers to three requests over one connection to a door that closes connections at `age`.
    fn answers(age: Duration) -> String {
        let sockets = std::env::temp_dir().join(format!("door-{}", random()));
        let inner = tiny_http::Server::http_unix(&sockets).unwrap();
        thread::spawn(move || inner.incoming_requests().try_for_each(|it| it.respond(tiny_http::Response::empty(204))));
        let serving = Arc::new(Serving::default());
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = pem("PRIVATE KEY", &made.signing_key.serialize_der());
        *lock(&serving.key) = certified_key(pem("CERTIFICATE", made.cert.der()).as_bytes(), key.as_bytes()).ok();
        let kube = forever(Kube::new(&Config::read(|_| None).unwrap()));
        let door = forever(Door {
            connections: forever(Connections { places: 8, ..Connections::default() }),
            tls: server_config(serving, true).unwrap(),
            trust: forever(Trust { kube, current: Mutex::default(), asked: Mutex::default() }),
            front_proxy: PathBuf::new(),
            direct: sockets.clone(),
            age,
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        thread::spawn(move || accept(&listener, door.connections, |stream, ticket| door.connection(stream, ticket)));
        let mut roots = rustls::RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut session = rustls::ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        let mut stream = rustls::Stream::new(&mut session, &mut socket);
        let mut text = String::new();
        for connection in ["keep-alive", "keep-alive", "close"] {
            let request = format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: {connection}\r\n\r\n");
            if stream.write_all(request.as_bytes()).is_err() {
                break;
            }
        }
        stream.read_to_string(&mut text).unwrap();
        std::fs::remove_file(sockets).unwrap();
        text
    }

    #[test]
    fn a_connection_that_is_old_gets_one_last_answer() {
        let count = |text: &str| (text.matches("HTTP/1.1 204").count(), text.matches("Connection: close").count());
        assert_eq!(count(&answers(Duration::from_secs(600))), (3, 1), "the client closes it");
        assert_eq!(count(&answers(Duration::ZERO)), (1, 1), "the door closes it");
    }
}

#[cfg(test)]
mod places {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    struct Pair {
        near: Arc<TcpStream>,
        far: TcpStream,
    }

    fn pair() -> Pair {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Pair { near: Arc::new(listener.accept().unwrap().0), far }
    }

    fn is_closed(pair: &mut Pair) -> bool {
        pair.far.set_nonblocking(true).unwrap();
        !matches!(pair.far.read(&mut [0]), Err(error) if error.kind() == WouldBlock)
    }

    #[test]
    fn a_new_connection_takes_the_place_of_the_oldest_that_proved_nothing() {
        let connections = forever(Connections { places: 4, ..Connections::default() });
        let mut pairs: Vec<Pair> = (0..5).map(|_| pair()).collect();
        let mut tickets: Vec<Option<Ticket>> = pairs.iter().take(3).map(|pair| connections.admit(&pair.near)).collect();
        tickets[0].as_ref().unwrap().set(true, false);
        tickets.push(connections.admit(&pairs[3].near));
        assert!(tickets[3].is_some());
        assert_eq!([0, 1, 2].map(|at| is_closed(&mut pairs[at])), [false, true, false]);
        assert!(connections.admit(&pairs[4].near).is_none(), "what was closed keeps its place until it ends");
        assert!(is_closed(&mut pairs[2]) && connections.crowded());
        drop(tickets.drain(1..3));
        tickets.push(connections.admit(&pairs[2].near));
        tickets.iter().flatten().for_each(|ticket| ticket.set(true, false));
        assert!(connections.admit(&pairs[4].near).is_none(), "verified connections are never closed for a new one");
        tickets.remove(0);
        assert!(connections.admit(&pairs[4].near).is_some());
    }

    #[test]
    fn draining_closes_what_is_idle_and_waits_for_what_is_not() {
        let connections = forever(Connections { places: 3, ..Connections::default() });
        let (mut idle, busy) = (pair(), pair());
        let tickets = [connections.admit(&idle.near).unwrap(), connections.admit(&busy.near).unwrap()];
        tickets[1].set(false, true);
        connections.draining.store(true, Relaxed);
        assert!(connections.draining.load(Relaxed));
        assert!(!connections.close_idle(Duration::ZERO));
        assert_eq!((&*idle.near).read(&mut [0]).unwrap(), 0, "the idle connection reads its end");
        let [first, second] = tickets;
        drop(first);
        assert!(!connections.close_idle(Duration::ZERO));
        drop(second);
        assert!(connections.close_idle(Duration::ZERO));
        assert!(!is_closed(&mut idle), "closing is up to the connection's own thread");
    }
}
