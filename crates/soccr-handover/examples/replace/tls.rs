//! TLS for the server: rustls makes the handshake, and the kernel does the rest. From then on the socket is read and written as if there
//! were none, and what has to go along when it moves is in the connection.

use std::error::Error;
use std::io::Read;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ConnectionTrafficSecrets, ProtocolVersion, ServerConfig, ServerConnection};
use soccr::tls::{Cipher, Secrets, Tls, Version};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// For a client that says nothing: meanwhile the others wait.
const LIMIT: Duration = Duration::from_secs(5);

/// A server with this certificate and key, in PEM files.
pub fn configuration(certificate: &str, key: &str) -> Result<Arc<ServerConfig>> {
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<std::result::Result<_, _>>()?;
    let mut configuration = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(key)?)?;
    configuration.enable_secret_extraction = true;
    Ok(Arc::new(configuration))
}

/// Makes the handshake, and gives the keys to the kernel.
pub fn accept(configuration: &Arc<ServerConfig>, mut stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let mut session = ServerConnection::new(Arc::clone(configuration))?;
    let mut records = Records { stream, record: Vec::new() };
    while session.is_handshaking() || session.wants_write() {
        if session.wants_write() {
            session.write_tls(&mut stream)?;
        } else if session.read_tls(&mut records)? == 0 {
            return Err("the client has gone".into());
        } else {
            session.process_new_packets()?;
        }
    }
    let version = match session.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => Version::Tls13,
        _ => Version::Tls12,
    };
    let secrets = session.dangerous_extract_secrets()?;
    let (cipher, transmit) = for_kernel(secrets.tx)?;
    let mut tls = Tls::new(version, cipher);
    tls.transmit = Some(transmit);
    tls.receive = Some(for_kernel(secrets.rx)?.1);
    Ok(tls.start(stream)?)
}

/// Nonce, key, salt and record number, as `linux/tls.h` has them.
fn for_kernel((number, secrets): (u64, ConnectionTrafficSecrets)) -> Result<(Cipher, Secrets)> {
    let (cipher, key, iv) = match &secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Cipher::AesGcm128, key, iv.as_ref()),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Cipher::AesGcm256, key, iv.as_ref()),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            (Cipher::ChaCha20Poly1305, key, iv.as_ref())
        }
        _ => return Err("a cipher that the kernel does not have".into()),
    };
    let (salt, nonce) = iv.split_at(if cipher == Cipher::ChaCha20Poly1305 { 0 } else { 4 });
    let whole = [nonce, key.as_ref(), salt, &number.to_be_bytes()].concat();
    Ok((cipher, Secrets::new(cipher, &whole)?))
}

/// Reads one record after the other: what comes behind the handshake is the kernel's.
struct Records<'a> {
    stream: &'a TcpStream,
    /// What is left of the record.
    record: Vec<u8>,
}

impl Read for Records<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        if self.record.is_empty() {
            self.record.resize(5, 0);
            self.stream.read_exact(&mut self.record)?;
            let length = u16::from_be_bytes([self.record[3], self.record[4]]);
            self.record.resize(5 + usize::from(length), 0);
            self.stream.read_exact(&mut self.record[5..])?;
        }
        let length = bytes.len().min(self.record.len());
        bytes[..length].copy_from_slice(&self.record[..length]);
        self.record.drain(..length);
        Ok(length)
    }
}
