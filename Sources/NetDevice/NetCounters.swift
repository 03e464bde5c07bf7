/// What happened to frames, for logs and tests.
package struct NetCounters: Equatable, Sendable {
  /// Frames passed from the driver to the port.
  package var transmitted: UInt64 = 0
  /// Frames of the driver's that break the rules.
  package var refused: UInt64 = 0
  /// Frames the kernel or the peer did not take, or that came while the link was down or the queue disabled.
  package var notSent: UInt64 = 0
  /// Frames passed from the port to the driver.
  package var received: UInt64 = 0
  /// Frames that did not fit the driver's buffers.
  package var tooLong: UInt64 = 0
  /// Frames that need an offload the driver has not agreed to, or are no frames.
  package var unsuitable: UInt64 = 0
  /// Buffers of the driver's without room for anything.
  package var uselessBuffers: UInt64 = 0
  /// How often frames had to wait for buffers.
  package var starvations: UInt64 = 0

  package init() {}

  package var summary: String {
    "\(transmitted) frames sent, \(refused) refused, \(notSent) not sent; \(received) received, \(tooLong) too long, "
      + "\(unsuitable) unsuitable, \(starvations) waits for buffers"
  }
}
