import ControlProtocol
import Glibc
import HostSystem

/// Memory in which one device process counts: a page for every queue. It outlives the process, so the numbers go on after a
/// restart. Whatever the process writes there, reading it is harmless.
final class StatisticsMemory {
  let file: FDBox
  private let mapping: MemoryMapping
  let queueCount: Int

  convenience init(queueCount: Int) throws(SystemError) {
    let count = max(queueCount, 8)
    let memory = try SharedMemory.sealed(name: "statistics", byteCount: UInt64(count * QueueStatistics.pageByteCount))
    try self.init(FDBox(memory), count: count)
  }

  /// Memory that the spawner has made: behind our walls none can be.
  convenience init(adopting file: FDBox, queueCount: Int) throws(SystemError) {
    try self.init(file, count: max(queueCount, 8))
  }

  private init(_ file: FDBox, count: Int) throws(SystemError) {
    queueCount = count
    guard let memory = file.take() else { throw SystemError("map statistics", .invalid) }
    mapping = try .shared(memory, byteCount: count * QueueStatistics.pageByteCount, writable: false)
    self.file = FDBox(memory)
  }

  var queues: [QueueStatisticsCopy] { (0..<queueCount).compactMap { QueueStatisticsCopy(mapping, page: $0) } }
}

/// `martlet ctl stats` and `martlet ctl resize-disk`.
extension Supervisor {
  /// Of the process that is about to start, or has had the device before.
  func statisticsMemory(of id: String, queueCount: Int) throws(SupervisionError) -> StatisticsMemory? {
    if let memory = statistics[id] { return memory }
    let memory = try attempt { () throws(SystemError) in
      try StatisticsMemory(queueCount: queueCount)
    } or: {
      .system($0)
    }
    statistics[id] = memory
    return memory
  }

  func tellStatistics(_ id: String?, to client: Int) {
    if let id, !assignments.contains(where: { $0.id == id }) { return refuse(client, "There is no device '\(id)'") }
    var devices: [JSONValue] = []
    for assignment in assignments where id == nil || assignment.id == id {
      guard let memory = statistics[assignment.id], case .program? = cares[assignment.id]?.kind else { continue }
      devices.append(
        .record([
          "id": .string(assignment.id), "type": .string(assignment.deviceType.description),
          "events": journal.describeCounts(of: assignment.id), "queues": .array(memory.queues.map(Self.describe)),
        ]))
    }
    if let id, devices.isEmpty { return refuse(client, "The back end of '\(id)' is not ours and tells no statistics") }
    reply(client, .record(["ok": .bool(true), "devices": .array(devices)]))
  }

  private static func describe(_ queue: QueueStatisticsCopy) -> JSONValue {
    let names: [(String, QueueStatistics.Word)] = [
      ("requests", .requests), ("bytes_read", .bytesRead), ("bytes_written", .bytesWritten), ("flushes", .flushes),
      ("errors", .errors), ("kicks", .kicks), ("merged_kicks", .mergedKicks), ("calls", .calls), ("batches", .batches),
      ("sleeps", .sleeps), ("polls", .polls), ("throttles", .throttles),
      ("replays", .replays),
    ]
    var members = [JSONValue.Member("queue", .unsigned(UInt64(queue.queue)))]
    for (name, word) in names { members.append(.init(name, .unsigned(queue[word]))) }
    for (name, kind) in [("reads", .reads), ("writes", .writes), ("others", .others)] as [(String, QueueStatistics.Histogram)] {
      let count = queue.count(kind)
      guard count > 0 else { continue }
      var buckets: [JSONValue] = []
      for (index, number) in queue.buckets(kind).enumerated() where number > 0 {
        buckets.append(.array([.unsigned(QueueStatistics.end(ofBucket: index)), .unsigned(number)]))
      }
      members.append(
        .init(
          "latency_" + name,
          .record([
            "count": .unsigned(count), "p50_ns": .unsigned(queue.percentile(50, kind) ?? 0),
            "p99_ns": .unsigned(queue.percentile(99, kind) ?? 0), "p99_9_ns": .unsigned(queue.percentile(99.9, kind) ?? 0),
            "buckets_ns": .array(buckets),
          ])))
    }
    return .object(members)
  }

  /// Gives the image a new size, where one is asked for, and tells the block process to look at it.
  func resizeDisk(_ arguments: [String], for client: Int) {
    let id = arguments[0]
    guard let care = cares[id], let image = care.image else {
      return refuse(client, "There is no disk '\(id)' with an image of ours; its host has to resize others")
    }
    guard phase == .running, case .none = care.step, let process = processes.first(where: { $0.id == id && $0.isAlive }) else {
      return refuse(client, "The disk '\(id)' is not served at the moment; ask again")
    }
    // It looks at the end of the image while it starts.
    guard care.spare?.isReady ?? true else { return refuse(client, "A spare of the disk '\(id)' is being started; ask again") }
    if arguments.count == 2 {
      guard let size = Quantity.byteCount(arguments[1]), size >= 512, size % 512 == 0, size <= UInt64(Int64.max) else {
        return refuse(client, "The size '\(arguments[1])' is not a multiple of 512 bytes; write 10G, 512M, or bytes")
      }
      guard !image.readOnly else { return refuse(client, "The disk '\(id)' is read-only; its image stays as it is") }
      do throws(SupervisionError) {
        if let spawner {
          try spawner.resize(id, to: size)
        } else {
          try HostFiles.resize(image.path, to: size, disk: id, sameAs: image.status)
        }
      } catch {
        return refuse(client, error.message ?? "The image of '\(id)' cannot be resized")
      }
    }
    process.signal(SIGHUP)
    processes.first { $0.id == Self.spareName(id) }?.signal(SIGHUP)
    reply(client, .record(["ok": .bool(true)]))
  }
}
