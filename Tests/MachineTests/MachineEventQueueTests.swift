import Machine
import Testing
import VirtioTransport

@Suite struct MachineEventQueueTests {
  private func describe(_ events: [MachineEvent]) -> [String] { events.map { "\($0)" } }

  @Test func aFloodOfConfigurationWritesLeavesOnePerPlaceWithTheLatestBytes() {
    var queue = MachineEventQueue()
    for round in 0..<10_000 {
      queue.append(.device(0, .configurationWritten(offset: round % 4, bytes: [UInt8(truncatingIfNeeded: round)])))
      queue.append(.device(1, .queueVectorChanged(queue: round % 2, vector: UInt16(round % 7))))
    }
    let events = queue.takeAll()
    #expect(events.count == 6)
    #expect(
      describe(events).contains(describe([.device(0, .configurationWritten(offset: 3, bytes: [UInt8(truncatingIfNeeded: 9_999)]))])[0]))
    #expect(queue.takeAll().isEmpty)
  }

  @Test func aShorterWriteKeepsTheBytesBehindIt() {
    var queue = MachineEventQueue()
    queue.append(.device(0, .configurationWritten(offset: 8, bytes: [1, 2, 3, 4])))
    queue.append(.device(0, .configurationWritten(offset: 8, bytes: [9])))
    #expect(describe(queue.takeAll()) == describe([.device(0, .configurationWritten(offset: 8, bytes: [9, 2, 3, 4]))]))
  }

  @Test func nothingIsMergedAcrossAReset() {
    var queue = MachineEventQueue()
    queue.append(.device(0, .configurationWritten(offset: 0, bytes: [1])))
    queue.append(.device(0, .reset))
    queue.append(.device(0, .configurationWritten(offset: 0, bytes: [2])))
    #expect(queue.takeAll().count == 3)
  }

  @Test func warningsAreBoundedAndOtherEventsAreNot() {
    var queue = MachineEventQueue()
    for _ in 0..<1000 { queue.append(.warning("noise")) }
    queue.append(.powerOff)
    let events = queue.takeAll()
    #expect(events.count == 65)
    #expect(describe([events[64]]) == ["powerOff"])
  }
}
