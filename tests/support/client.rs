//! A raw HTTPS/1.1 client: what it is told to send is what goes over the wire.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ALL_VERSIONS, ClientConfig, ClientConnection, DigitallySignedStruct, ProtocolVersion, RootCertStore, SignatureScheme,
    StreamOwned, SupportedProtocolVersion,
};
use serde_json::Value;

/// The name that the aggregator asks for, whatever address it dials.
pub const SERVER_NAME: &str = "api.custom-metrics.svc";

const PATIENCE: Duration = Duration::from_secs(15);

/// Where to connect to and as whom.
#[derive(Clone, Debug)]
pub struct Client {
    port: u16,
    server_name: String,
    config: Arc<ClientConfig>,
}

impl Client {
    /// Accepts whatever certificate the server shows.
    pub fn new(port: u16, identity: Option<&Identity>) -> Self {
        Self::build(port, SERVER_NAME, None, identity, ALL_VERSIONS)
    }

    /// Accepts a server of that name whose certificate leads to the CA.
    pub fn trusting(port: u16, ca_pem: &str, server_name: &str, identity: Option<&Identity>) -> Self {
        Self::build(port, server_name, Some(ca_pem), identity, ALL_VERSIONS)
    }

    /// As [`Self::new`], with TLS of these versions only.
    pub fn speaking(port: u16, identity: Option<&Identity>, versions: &[&'static SupportedProtocolVersion]) -> Self {
        Self::build(port, SERVER_NAME, None, identity, versions)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connects and shakes hands. With TLS 1.3 a client certificate is judged only afterwards.
    pub fn connect(&self) -> Connection {
        self.try_connect().expect("the server accepts a TLS connection")
    }

    pub fn try_connect(&self) -> io::Result<Connection> {
        let name = ServerName::try_from(self.server_name.clone()).map_err(io::Error::other)?;
        let session = ClientConnection::new(Arc::clone(&self.config), name).map_err(io::Error::other)?;
        let tcp = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, self.port)), PATIENCE)?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_write_timeout(Some(PATIENCE))?;
        let mut stream = StreamOwned::new(session, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Connection { stream, host: self.server_name.clone(), unread: Vec::new() })
    }

    /// One request over a connection of its own.
    pub fn request(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
        self.connect().request(method, target, headers)
    }

    pub fn try_request(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> io::Result<Response> {
        self.try_connect()?.try_request(method, target, headers)
    }

    pub fn get(&self, target: &str) -> Response {
        self.request("GET", target, &[])
    }

    /// Asks as the front proxy would on behalf of that user.
    pub fn get_as(&self, user: &str, groups: &[&str], target: &str) -> Response {
        self.connect().get_as(user, groups, target)
    }

    fn build(
        port: u16, server_name: &str, ca_pem: Option<&str>, identity: Option<&Identity>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Self {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .expect("the provider knows these versions");
        let builder = match ca_pem {
            None => builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(provider))),
            Some(pem) => builder.with_root_certificates(roots(pem)),
        };
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(leaf) => {
                builder.with_client_auth_cert(leaf.chain(), leaf.private_key()).expect("key and certificate belong together")
            }
        };
        config.resumption = Resumption::disabled();
        // As the aggregator offers them; a server that is verified may be another one, which speaks h2.
        let offered: &[&[u8]] = if ca_pem.is_none() { &[b"h2", b"http/1.1"] } else { &[b"http/1.1"] };
        config.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
        Self { port, server_name: server_name.to_owned(), config: Arc::new(config) }
    }
}

/// A certificate that a client shows.
pub type Identity = super::pki::Leaf;

/// A TLS connection that stays open until dropped.
#[derive(Debug)]
pub struct Connection {
    stream: StreamOwned<ClientConnection, TcpStream>,
    host: String,
    unread: Vec<u8>,
}

impl Connection {
    /// Sends these bytes and nothing else.
    pub fn send_raw(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send_raw(bytes).expect("the server takes the bytes");
    }

    pub fn try_send_raw(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref())?;
        self.stream.flush()
    }

    /// Sends a request without body and reads its answer. `Host` is added unless it is among the headers.
    pub fn request(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
        self.try_request(method, target, headers).unwrap_or_else(|error| panic!("{method} {target}: {error}"))
    }

    pub fn try_request(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) -> io::Result<Response> {
        let mut head = format!("{method} {target} HTTP/1.1\r\n");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            head += &format!("Host: {}\r\n", self.host);
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        self.try_send_raw(head + "\r\n")?;
        self.read(method != "HEAD")
    }

    pub fn get(&mut self, target: &str) -> Response {
        self.request("GET", target, &[])
    }

    /// Asks as the front proxy would on behalf of that user.
    pub fn get_as(&mut self, user: &str, groups: &[&str], target: &str) -> Response {
        let groups = groups.iter().map(|group| ("X-Remote-Group", *group));
        let headers: Vec<_> = std::iter::once(("X-Remote-User", user)).chain(groups).collect();
        self.request("GET", target, &headers)
    }

    /// Reads the next answer, also an interim one; not for HEAD.
    pub fn read_response(&mut self) -> Response {
        self.try_read_response().expect("the server answers")
    }

    pub fn try_read_response(&mut self) -> io::Result<Response> {
        self.read(true)
    }

    /// Waits for the server to end the connection; false if it sends something else or keeps it.
    pub fn closed(&mut self) -> bool {
        self.closed_within(PATIENCE)
    }

    /// As [`Self::closed`], waiting that long only.
    pub fn closed_within(&mut self, patience: Duration) -> bool {
        if !self.unread.is_empty() {
            return false;
        }
        match self.receive(Instant::now() + patience) {
            Ok(count) => count == 0,
            Err(error) => !matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock),
        }
    }

    /// The certificates that the server showed, its own first.
    pub fn server_chain(&self) -> Vec<CertificateDer<'static>> {
        self.stream.conn.peer_certificates().unwrap_or_default().iter().map(|der| der.clone().into_owned()).collect()
    }

    pub fn version(&self) -> Option<ProtocolVersion> {
        self.stream.conn.protocol_version()
    }

    /// What the server selected of h2 and http/1.1.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.stream.conn.alpn_protocol()
    }

    /// Ends the sending half of TCP, as a client does that has said everything.
    pub fn finish(&mut self) {
        self.stream.conn.send_close_notify();
        let _ = self.stream.flush();
        let _ = self.stream.sock.shutdown(std::net::Shutdown::Write);
    }

    fn read(&mut self, may_have_body: bool) -> io::Result<Response> {
        let deadline = Instant::now() + PATIENCE;
        let first = self.line(deadline)?;
        let mut words = first.splitn(3, ' ');
        let (Some("HTTP/1.1" | "HTTP/1.0"), Some(Ok(status))) = (words.next(), words.next().map(str::parse)) else {
            return Err(invalid(format!("no status line: {first:?}")));
        };
        let mut response = Response { status, headers: Vec::new(), body: Vec::new() };
        loop {
            let line = self.line(deadline)?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| invalid(format!("no header: {line:?}")))?;
            response.headers.push((name.to_owned(), value.trim().to_owned()));
        }
        if may_have_body && !matches!(status, 100..=199 | 204 | 304) {
            response.body = self.body(&response, deadline)?;
        }
        Ok(response)
    }

    fn body(&mut self, response: &Response, deadline: Instant) -> io::Result<Vec<u8>> {
        if response.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            return self.chunks(deadline);
        }
        if let Some(length) = response.header("content-length") {
            let length = length.parse().map_err(|_| invalid(format!("Content-Length: {length}")))?;
            return self.take(length, deadline);
        }
        while self.receive(deadline).or_else(end_of_stream)? > 0 {}
        Ok(std::mem::take(&mut self.unread))
    }

    fn chunks(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.line(deadline)?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).map_err(|_| invalid(format!("chunk size {line:?}")))?;
            body.append(&mut self.take(size, deadline)?);
            let end = self.line(deadline)?;
            if !end.is_empty() {
                return Err(invalid(format!("after a chunk: {end:?}")));
            }
            if size == 0 {
                return Ok(body);
            }
        }
    }

    fn line(&mut self, deadline: Instant) -> io::Result<String> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\r\n") {
                let line = self.unread.drain(..end + 2).take(end).collect();
                return String::from_utf8(line).map_err(|error| invalid(error.to_string()));
            }
            self.more(deadline)?;
        }
    }

    fn take(&mut self, length: usize, deadline: Instant) -> io::Result<Vec<u8>> {
        while self.unread.len() < length {
            self.more(deadline)?;
        }
        Ok(self.unread.drain(..length).collect())
    }

    fn more(&mut self, deadline: Instant) -> io::Result<()> {
        match self.receive(deadline)? {
            0 => Err(io::Error::new(ErrorKind::UnexpectedEof, "the server ended the connection")),
            _ => Ok(()),
        }
    }

    fn receive(&mut self, deadline: Instant) -> io::Result<usize> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(ErrorKind::TimedOut, "no answer in time"));
        }
        self.stream.sock.set_read_timeout(Some(left))?;
        let mut buffer = [0; 16 * 1024];
        let count = self.stream.read(&mut buffer)?;
        self.unread.extend_from_slice(&buffer[..count]);
        Ok(count)
    }
}

/// An answer, read to its end.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    /// The first header of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Names and values of a list's items.
    #[track_caller]
    pub fn values(&self) -> BTreeMap<String, String> {
        assert_eq!(self.status, 200, "{}", self.text());
        let list = self.json();
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let item = |item: &Value| (text(&item["describedObject"]["name"]), text(&item["value"]));
        list["items"].as_array().expect("items").iter().map(item).collect()
    }

    /// The value of the only item.
    #[track_caller]
    pub fn value(&self) -> String {
        let values = self.values();
        assert_eq!(values.len(), 1, "{values:?}");
        values.into_values().next().unwrap()
    }

    /// Status code, reason word and message of a refusal.
    #[track_caller]
    pub fn refusal(&self) -> (u16, String, String) {
        assert!(self.status >= 400, "{}", self.text());
        let status = self.json();
        let text = |pointer: &str| status.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        (self.status, text("/details/causes/0/reason"), text("/message"))
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Trusts every certificate whose key the server holds.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self, _: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: &ServerName<'_>, _: &[u8], _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self, message: &[u8], cert: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self, message: &[u8], cert: &CertificateDer<'_>, signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn roots(pem: &str) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        roots.add(certificate.expect("the CA is PEM")).expect("the CA can be an anchor");
    }
    roots
}

/// A server may end the connection without the closing alert of TLS.
fn end_of_stream(error: io::Error) -> io::Result<usize> {
    if error.kind() == ErrorKind::UnexpectedEof { Ok(0) } else { Err(error) }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, message)
}
