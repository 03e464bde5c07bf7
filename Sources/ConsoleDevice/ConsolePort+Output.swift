import CLinux
import HostSystem

extension ConsolePort {
  /// Takes bytes of the guest's; returns how many. Fewer than given only while a present reader is slow: `Outcome.room`
  /// says when to try again.
  package func write(_ bytes: UnsafeRawBufferPointer) -> Int {
    if kind == .null { return bytes.count }
    if outputHasEnded {
      drop(bytes.count)
      return bytes.count
    }
    if case .absent = reader {
      drop(unsafe output.appendDroppingOldest(bytes))
      return bytes.count
    }
    var done = 0
    // Bounded: each turn but the last sends something. Buffered output goes first.
    while output.isEmpty, done < bytes.count {
      // SAFETY: `done` is below the count.
      switch unsafe sink.write(UnsafeRawBufferPointer(rebasing: bytes[done...]), client: client) {
      case .bytes(let count): done += count
      case .failed(let error):
        outputFailed(error)
        if kind == .socket { break }
        drop(bytes.count - done)
        return bytes.count
      case .wouldBlock, .end:
        // SAFETY: as above.
        done += unsafe output.append(UnsafeRawBufferPointer(rebasing: bytes[done...]))
        return holdUp(done, of: bytes.count)
      }
      // The client left in between: the rest is kept like all output without a reader.
      if case .absent = reader {
        drop(unsafe output.appendDroppingOldest(UnsafeRawBufferPointer(rebasing: bytes[done...])))
        return bytes.count
      }
    }
    // SAFETY: `done` is at most the count.
    done += unsafe output.append(UnsafeRawBufferPointer(rebasing: bytes[done...]))
    return holdUp(done, of: bytes.count)
  }

  /// Takes all bytes, dropping what does not fit: the rest of a request that cannot wait any longer.
  package func writeOrDrop(_ bytes: UnsafeRawBufferPointer) {
    let done = unsafe write(bytes)
    // SAFETY: `done` is at most the count.
    if done < bytes.count { drop(unsafe output.appendDroppingOldest(UnsafeRawBufferPointer(rebasing: bytes[done...]))) }
  }

  /// Bytes the sink has not taken yet.
  package var unsentByteCount: Int { output.count }

  /// Writes as much of the kept output as the sink takes now.
  @discardableResult
  package func flush() -> Outcome {
    var progressed = false
    // Bounded: each turn but the last removes something.
    while !output.isEmpty, !outputHasEnded {
      let sent = unsafe output.withOldest { oldest in unsafe sink.write(oldest, client: client) }
      switch sent {
      case .bytes(let count):
        output.removeFirst(count)
        progressed = true
      case .wouldBlock, .end: return progressed ? readerProgressed() : []
      case .failed(let error):
        outputFailed(error)
        return .room
      }
    }
    return kind == .socket && client == nil ? [] : readerProgressed()
  }

  /// The last chance at the end of the process: waits for a present reader, at most as long as patience lasts.
  package func finish() {
    let deadline = MonotonicTime.now.advanced(by: Self.patience)
    // Bounded by the deadline.
    while MonotonicTime.now < deadline {
      flush()
      if output.isEmpty || outputHasEnded || reader == .absent { return }
      sink.waitUntilWritable(client: client, timeout: deadline.since(.now))
    }
  }

  private func readerProgressed() -> Outcome {
    reader = .present
    stopPatience()
    // Still full cannot be: something has just been taken. The next refusal starts a new wait.
    return .room
  }

  private func holdUp(_ done: Int, of count: Int) -> Int {
    if done < count, !patienceIsRunning {
      patienceIsRunning = true
      patienceTimer.set(MonotonicTime.now.advanced(by: Self.patience))
    }
    return done
  }

  private func stopPatience() {
    if patienceIsRunning {
      patienceIsRunning = false
      patienceTimer.set(nil)
    }
  }

  func losePatience() -> Outcome {
    patienceTimer.acknowledge()
    patienceIsRunning = false
    reader = .absent
    return .room
  }

  /// Nobody can see output any more: it is dropped from now on.
  func endOutput() -> Outcome {
    outputHasEnded = true
    drop(output.count)
    output.removeFirst(output.count)
    stopPatience()
    return .room
  }

  func drop(_ count: Int) { droppedByteCount &+= UInt64(count) }

  private func outputFailed(_ error: Errno) {
    switch kind {
    case .socket: disconnect()
    case .file:
      // A full disk may have room again later: this output is lost, the next is tried.
      if complaints.allows() { Log.warning("Output file cannot be written (\(error)); output is dropped") }
      drop(output.count)
      output.removeFirst(output.count)
    default:
      if complaints.allows() { Log.warning("Terminal cannot be written (\(error)); output is dropped from now on") }
      _ = endOutput()
    }
  }
}
