/// What a driver wrote to the configuration space and the back end has not been told yet. However fast a guest writes,
/// this stays as small as the space.
struct ConfigurationWrites {
  /// By offset; nil: nothing to tell.
  private var bytes: [UInt8?] = []

  var isEmpty: Bool { !bytes.contains { $0 != nil } }

  mutating func add(offset: Int, _ new: [UInt8]) {
    let end = offset + new.count
    while bytes.count < end { bytes.append(nil) }
    for (index, byte) in new.enumerated() { bytes[offset + index] = byte }
  }

  /// The first run of bytes that were written.
  mutating func takeRun() -> (offset: Int, bytes: [UInt8])? {
    guard let start = bytes.firstIndex(where: { $0 != nil }) else { return nil }
    var run: [UInt8] = []
    var index = start
    while index < bytes.count, let byte = bytes[index] {
      run.append(byte)
      bytes[index] = nil
      index += 1
    }
    return (start, run)
  }

  mutating func removeAll() { bytes = [] }
}
