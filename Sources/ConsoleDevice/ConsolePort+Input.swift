import HostSystem

extension ConsolePort {
  package var inputCount: Int { input.count }

  /// Moves input into `target`; returns how many bytes.
  package func takeInput(into target: UnsafeMutableRawBufferPointer) -> Int {
    let count = unsafe input.take(into: target)
    if inputIsUnwatchable { _ = readInput() }
    return count
  }

  /// Lends input in one piece; `body` says how much of it is done with.
  package func withInput(_ body: (UnsafeRawBufferPointer) -> Int) {
    let count = unsafe input.withOldest(body)
    input.removeFirst(count)
    if inputIsUnwatchable { _ = readInput() }
  }

  /// Begins reading where the loop cannot tell us to (regular files).
  package func readUnwatchableInput() -> Outcome { inputIsUnwatchable ? readInput() : [] }

  /// Reads what there is, as far as there is room: what does not fit stays with the kernel, and nothing is lost.
  func readInput() -> Outcome {
    var outcome: Outcome = []
    // Bounded: the escape key may turn one byte into two, so one place is kept; each turn but the last fills some.
    while input.freeCount > 1, !inputHasEnded, !clientInputHasEnded, !outcome.contains(.quit) {
      let limit = min(input.freeCount - 1, 512)
      var transfer = Transfer.wouldBlock
      // SAFETY: the closure says how many bytes of the buffer were filled.
      let bytes = unsafe [UInt8](unsafeUninitializedCapacity: limit) { buffer, count in
        transfer = unsafe sink.read(
          into: UnsafeMutableRawBufferPointer(rebasing: UnsafeMutableRawBufferPointer(buffer)[..<limit]), client: client)
        if case .bytes(let read) = transfer { count = read } else { count = 0 }
      }
      switch transfer {
      case .bytes:
        outcome.insert(.input)
        if accept(bytes) { outcome.insert(.quit) }
      case .wouldBlock: return outcome
      case .end, .failed:
        if kind == .socket { clientInputHasEnded = true } else { inputHasEnded = true }
      }
    }
    return outcome
  }

  /// Passes typed bytes on; true when the escape key asks for the end.
  private func accept(_ bytes: [UInt8]) -> Bool {
    guard escape != nil else {
      _ = unsafe bytes.withUnsafeBytes { all in unsafe input.append(all) }
      return false
    }
    var passed: [UInt8] = []
    passed.reserveCapacity(bytes.count + 1)
    var quit = false
    for byte in bytes where !quit {
      switch escape?.filter(byte) {
      case .byte(let byte): passed.append(byte)
      case .keyAnd(let byte): passed += [EscapeFilter.key, byte]
      case .quit: quit = true
      case .nothing, nil: break
      }
    }
    _ = unsafe passed.withUnsafeBytes { all in unsafe input.append(all) }
    return quit
  }

  /// The next client of the listening socket.
  func accept() -> Outcome {
    guard client == nil else { return [] }
    do throws(SystemError) {
      guard let fd = try sink.accept() else { return [] }
      client = consume fd
    } catch {
      // Out of descriptors, most likely: the client waits in the queue and would be reported again at once.
      if complaints.allows() { Log.warning("Console client cannot be accepted: \(error)") }
      return []
    }
    clientInputHasEnded = false
    clientHasHungUp = false
    reader = .present
    return flush().union(.room)
  }

  func disconnect() {
    client = nil
    clientInputHasEnded = false
    clientHasHungUp = false
    reader = .absent
  }
}
